"""Table 1 of the paper in miniature: temporal designs of the tiny autoencoder.

  python -m benchmarks.designs --workdir=DIR
  python -m benchmarks.designs --workdir=DIR --table

The first command trains the tiny autoencoder with chunks of 8, 16 and 40
frames, causal and non-causal, with the same parameters, at 384 and 48 times
compression and for two seeds, on 40-frame clips. Chunks of 16 do not divide
them, and take 32 frames of each. It takes hours: stages that are done are
skipped when the command is started again, and an interrupted training continues
from its last checkpoint.

The second command measures the models that are trained by now on held-out
clips of 40 and 120 frames, and writes DIR/designs.md. Models that it has
measured before are not measured again.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.programs import common, reproduce
from dcvideogen_jax.tiny import chain

_TABLE = flags.DEFINE_bool(
  "table", False, "Measure the models that are trained, and write the table."
)

# Two chunks of 16 frames, and as many frames in all as the others see.
_TWO_CHUNKS = (
  "--config.data.frames=32",
  "--config.val.data.frames=32",
  "--config.steps=1250",
)
# Name -> flags of the model.
DESIGNS = {
  **{
    f"chunk_{n}": ("chunk_causal", f"--config.model.chunk_frames={n}", *more)
    for n, more in ((8, ()), (16, _TWO_CHUNKS), (40, ()))
  },
  "causal": ("causal",),
  "non_causal": ("non_causal",),
}
# Compression -> latent channels of f32t4.
CHANNELS = {384: 32, 48: 256}
SEEDS = (0, 1)
# Frames of the held-out clips that are measured: as in training, and longer.
LENGTHS = (40, 120)
# With LPIPS as in the official evaluation, and FVD of whole clips.
METRICS = ("--lpips=alex", "--fvd", "--nofvd_windows", "--keep")


# Videos whose scenes are shorter than the clips.
_SHORT = ("room.mp4", "newton*", "city.mpg")


def _clips(split: str, frames: int) -> chain.Stage:
  return chain.Stage(
    f"{split}_clips",
    f"{split}_clips",
    "launch.prepare_clips",
    (
      f"--split={split}",
      f"--frames={frames}",
      f"--output={{work}}/{split}_clips",
      *(f"--exclude={name}" for name in _SHORT),
    ),
  )


def model(design: str, compression: int, seed: int) -> str:
  """Returns the name of a training, and of its folder."""
  return f"{design}_{compression}_{seed}"


def _train(design: str, compression: int, seed: int) -> chain.Stage:
  time, *flags_of_model = DESIGNS[design]
  return chain.train(
    model(design, compression, seed),
    f"configs/tiny.py:autoencoder,time={time}",
    f"--config.seed={seed}",
    f"--config.model.latent_channels={CHANNELS[compression]}",
    "--config.data.frames=40",
    "--config.batch_size=2",
    "--config.data.path={work}/train_clips",
    "--config.val.data.frames=40",
    "--config.val.data.path={work}/heldout_clips/frames120",
    *flags_of_model,
    group=f"{compression}x, seed {seed}",
  )


STAGES = (
  _clips("train", 40),
  _clips("heldout", 120),
  *(
    _train(design, compression, seed)
    for seed in SEEDS
    for compression in CHANNELS
    for design in DESIGNS
  ),
)


def trained(work: pathlib.Path) -> list[str]:
  """Returns the names of the models that are exported, in a fixed order."""
  names = [
    model(design, compression, seed)
    for compression in CHANNELS
    for design in DESIGNS
    for seed in SEEDS
  ]
  return [name for name in names if any((work / name / "model").glob("*"))]


def measure(work: pathlib.Path, frames: int) -> dict[str, Any]:
  """Measures the trained models on clips of that many frames.

  Args:
    work: folder of the chain.
    frames: of the clips.

  Returns:
    The report of `evaluate reconstruction`.

  Raises:
    errors.UserError: if no model is trained yet.
  """
  names = trained(work)
  if not names:
    raise errors.UserError(f"{work} has no trained model yet")
  output = work / "designs" / f"frames{frames}.json"
  line = [sys.executable, "-m", "launch.evaluate", f"--output={output}"]
  line += [f"--model={work / name / 'model'}" for name in names]
  line += [f"--clips={work / 'heldout_clips' / 'frames120'}"]
  line += [f"--frames={frames}", *METRICS]
  if code := subprocess.run(line).returncode:
    sys.exit(code)
  return json.loads(output.read_text())


# The columns of the table: key, heading, digits.
_COLUMNS = (
  ("psnr", "PSNR, dB", 2),
  ("ssim", "SSIM", 4),
  ("lpips", "LPIPS", 4),
  ("fvd", "FVD", 1),
)


def table(work: pathlib.Path, reports: Mapping[int, Mapping[str, Any]]) -> str:
  """Returns a table of the designs as Markdown.

  A cell is the mean over the seeds that are trained. Behind it is the spread:
  for PSNR and LPIPS the standard deviation over the clips, for FVD the standard
  error of a jackknife over the clips, both averaged over the seeds; and then
  the difference of the seeds, if there are two.

  Args:
    work: folder of the chain.
    reports: of `measure`, by the frames of the clips.
  """
  rows = []
  for frames, report in reports.items():
    about = {**report["about"], "frames": frames}
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    rows += [
      f"{frames} frames: {told}, FVD of whole clips, N = {report['fvd_n']}.\n",
      "| compression | design | seeds | "
      + " | ".join(heading for _, heading, _ in _COLUMNS)
      + " |",
      "|---" * (3 + len(_COLUMNS)) + "|",
    ]
    for compression in CHANNELS:
      for design in DESIGNS:
        found = [
          report["models"][path]
          for seed in SEEDS
          if (path := str(work / model(design, compression, seed) / "model"))
          in report["models"]
        ]
        if found:
          cells = [_cell(found, key, digits) for key, _, digits in _COLUMNS]
          head = [f"{compression}", design.replace("_", " "), f"{len(found)}"]
          rows.append("| " + " | ".join(head + cells) + " |")
    rows.append("")
  return "\n".join(rows)


def _cell(found: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
  values = [row[key] for row in found]
  cell = f"{np.mean(values):.{digits}f}"
  spread = f"{key}_error" if key == "fvd" else f"{key}_std_over_clips"
  cell += f" ± {np.mean([row[spread] for row in found]):.{digits}f}"
  if len(values) == 2:
    cell += f" (seeds differ by {abs(values[0] - values[1]):.{digits}f})"
  return cell


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not done yet, or writes the table."""
  del argv
  if not _TABLE.value:
    if reproduce.run(STAGES):
      print(f"{reproduce.work()}: everything is done")
    return
  work = reproduce.work()
  reports = {frames: measure(work, frames) for frames in LENGTHS}
  text = table(work, reports)
  with files.atomic(work / "designs.md") as path:
    path.write_text(text, encoding="utf-8")
  print(text)


if __name__ == "__main__":
  common.run(main)
