"""Streams videos of the captioned world and scores them.

  python -m benchmarks.streams --model=DIR --prompts=96 --window=1 \\
    --lengths=1,4,16 --output=out/stream.json

The model must be block-causal. For each of --lengths, the clip that ends after
that many times the frames of --size is scored: how often colour, shape and
motion of the held-out prompt are right. `out/stream.png` shows the last clips
of the first videos. `out/stream.pace.png` shows seconds per frame and peak
memory against frames.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tqdm
from absl import flags
from matplotlib import figure

from dcvideogen_jax import clock, errors, files, provenance
from dcvideogen_jax.diffusion import few
from dcvideogen_jax.eval import contact_sheet
from dcvideogen_jax.programs import cli, common
from dcvideogen_jax.sample import (
  few_steps,
  loading,
  model_names,
  pipeline,
  streams,
)
from dcvideogen_jax.tiny import scorer, world

_MODEL = flags.DEFINE_string(
  "model", "tiny", "The pipeline; the same values as for launch.sample."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "JSON file to write.", required=True
)
_PROMPTS = flags.DEFINE_integer(
  "prompts",
  96,
  "Number of held-out prompts; a number always gives the same ones.",
  lower_bound=1,
)
_STEPS = flags.DEFINE_integer(
  "steps", 20, "Steps of the solver.", lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
  "guidance", 3.0, "Guidance scale; 1 is no guidance."
)
_SHIFT = flags.DEFINE_float(
  "shift", None, "Shift of the noise levels. Unset: the checkpoint's."
)
_SIZE = flags.DEFINE_list(
  "size", ["16", "64", "64"], "Frames, height and width of a clip."
)
_LENGTHS = flags.DEFINE_list(
  "lengths",
  ["1", "4", "16"],
  "Where the scored clips end, in lengths of a clip; the largest is the length"
  " of the video.",
)
_WINDOW = flags.DEFINE_integer(
  "window", None, "Earlier chunks that a chunk attends to. Unset: all."
)
_SINK = flags.DEFINE_integer(
  "sink",
  0,
  "First chunks of the video to which every chunk attends, besides --window.",
)
_CHUNK = flags.DEFINE_integer(
  "chunk", None, "Latent frames of a chunk. Unset: the transformer's own."
)
_FEW = flags.DEFINE_string(
  "few",
  None,
  "Few-step LoRA for streams, an export of the phase few; its few.json settles"
  " steps, guidance, shift and chunk.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 25, "Number of videos in a batch.", lower_bound=1
)
_SHOWN = 32


def main(argv: Sequence[str]) -> None:
  """Streams the videos, prints the scores and writes JSON and pictures.

  Raises:
    errors.UserError: for flags or a model that do not fit.
  """
  del argv
  output = pathlib.Path(_OUTPUT.value)
  streams.check(_WINDOW.value, _SINK.value, 0.0)
  numbers = [*_LENGTHS.value, *_SIZE.value]
  if len(_SIZE.value) != 3 or not all(
    n.isdecimal() and int(n) for n in numbers
  ):
    raise errors.UserError(
      "--lengths and --size (frames,height,width) must be whole numbers from 1 "
      f"on, found {_LENGTHS.value} and {_SIZE.value}"
    )
  with common.output_directory(output.parent):
    model, how = _load()
    scores = score(
      model,
      _PROMPTS.value,
      _BATCH_SIZE.value,
      [int(n) for n in _SIZE.value],
      [int(n) for n in _LENGTHS.value],
      window=_WINDOW.value,
      sink=_SINK.value,
      **how,
    )
    report = {
      "model": _MODEL.value,
      "few": _FEW.value,
      "prompts": _PROMPTS.value,
      "accuracy": scores.accuracy,
      "videos": scores.videos,
      "pace": scores.pace,
      "settings": {**scores.settings, "prompts": None, "seeds": None},
      "versions": provenance.versions(),
    }
    with files.atomic(output.with_suffix(".png")) as path:
      PIL.Image.fromarray(contact_sheet.strips(scores.shown)).save(path)
    with files.atomic(output.with_suffix(".pace.png")) as path:
      plot(scores.pace, path)
    with files.atomic(output) as path:
      path.write_text(provenance.to_json(report), encoding="utf-8")
  for frames, accuracy in scores.accuracy.items():
    shares = ", ".join(f"{k} {100 * x:.1f} %" for k, x in accuracy.items())
    print(f"{_PROMPTS.value} held-out prompts, frame {frames}: {shares}")
  print(summary(scores.pace))


def _load() -> tuple[pipeline.DCVideoGen, dict[str, Any]]:
  """Loads the model; returns it and the options of its streams.

  Raises:
    errors.UserError: for flags that --few settles, or a LoRA that does not fit.
  """
  source = model_names.pipeline(_MODEL.value)
  if _FEW.value is None:
    return pipeline.DCVideoGen(loading.load(source, task="t2v")), {
      "chunk": _CHUNK.value,
      "steps": _STEPS.value,
      "guidance_scale": _GUIDANCE.value,
      "shift": _SHIFT.value,
    }
  common.refuse_flags(["steps", "guidance", "shift"], "is settled by --few")
  choice = few_steps.given([_FEW.value], stream=True)
  if choice is None:
    raise errors.UserError(f"--few={_FEW.value} has no {few.FILE}")

  loras = [model_names.LoraFile(_FEW.value)]
  change = functools.partial(model_names.with_loras, loras=loras)
  parts = loading.load(source, task="t2v", change=change)
  return pipeline.DCVideoGen(parts), {
    "chunk": few_steps.chunk(choice, _CHUNK.value),
    "guidance_scale": 1.0,
    "options": parts.options._replace(
      levels=choice.steps.levels, solver=choice.steps.solver, solver_options={}
    ),
  }


class Scores(NamedTuple):
  """Scores and speed of streams.

  Attributes:
    accuracy: shares of right facts (`scorer.score`), by the number of frames
      after which a clip ends. A shape that has come to rest by then
      (`world.later`) must stand still.
    videos: for each video prompt, seed, and the readings by that number of
      frames.
    pace: `clock.arrival` of each chunk of the last batch: frames and seconds so
      far, peak host and device memory.
    shown: the last clips of the first videos, uint8 `n t h w 3`.
    settings: settings of the first batch.
  """

  accuracy: dict[int, dict[str, float]]
  videos: list[dict[str, Any]]
  pace: list[dict[str, Any]]
  shown: np.ndarray
  settings: Mapping[str, Any]


def score(
  model: pipeline.DCVideoGen,
  count: int,
  batch_size: int,
  size: Sequence[int],
  lengths: Sequence[int],
  **options: Any,
) -> Scores:
  """Streams a video for each held-out prompt and scores clips of it.

  Args:
    model: a block-causal text-to-video pipeline.
    count: number of prompts; see `scorer.questions`.
    batch_size: number of videos in a batch.
    size: frames of a scored clip, height and width.
    lengths: where scored clips end, in lengths of a clip; the largest is the
      length of the video.
    **options: options of `DCVideoGen.generate_stream`.

  Raises:
    errors.UserError: as `generate_stream` and `world.later`.
  """
  questions = scorer.questions(count)
  batch_size = min(batch_size, count)
  frames, height, width = size
  ends = [n * frames for n in sorted(lengths)]
  scenes = {
    end: [world.later(q.scene, end - frames, height, width) for q in questions]
    for end in ends
  }
  readings: dict[int, list[scorer.Reading]] = {end: [] for end in ends}
  shown: list[np.ndarray] = []
  settings: Mapping[str, Any] = {}
  pace: list[dict[str, Any]] = []
  for start in tqdm.trange(0, count, batch_size, unit="batch", disable=None):
    asked = [questions[(start + i) % count] for i in range(batch_size)]
    stream = model.generate_stream(
      [q.prompt for q in asked],
      seed=[q.seed for q in asked],
      frames=ends[-1],
      height=height,
      width=width,
      **options,
    )
    settings = settings or stream.settings
    clips, pace = _clips(stream, frames, ends)
    wanted = count - start
    for end, clip in clips.items():
      readings[end] += [scorer.read(video) for video in clip[:wanted]]
    room = max(0, _SHOWN - len(shown))
    shown += [*clips[ends[-1]][: min(wanted, room)]]
  return Scores(
    {end: scorer.score(x, scenes[end]) for end, x in readings.items()},
    [
      {
        "prompt": q.prompt,
        "seed": q.seed,
        "read": {end: x[i]._asdict() for end, x in readings.items()},
      }
      for i, q in enumerate(questions)
    ],
    pace,
    np.stack(shown),
    settings,
  )


def _clips(stream, frames, ends):
  """Collects the clips that end at `ends`, and the arrival of each chunk."""
  found, pace, count, since = {}, [], 0, time.perf_counter()
  last = None
  for chunk in stream.chunks():
    count += chunk.shape[1]
    last = chunk if last is None else np.concatenate([last, chunk], axis=1)
    for end in ends:
      if end <= count and end not in found:
        stop = last.shape[1] - (count - end)
        found[end] = last[:, stop - frames : stop]
    last = last[:, -frames - chunk.shape[1] :]
    pace.append(clock.arrival(count, since))
  return found, pace


Pace = Sequence[Mapping[str, Any]]


def seconds(pace: Pace) -> list[float]:
  """Returns the seconds per frame of each chunk."""
  ends = [{"frames": 0, "seconds": 0.0}, *pace]
  return [
    (after["seconds"] - before["seconds"])
    / (after["frames"] - before["frames"])
    for before, after in zip(ends, pace, strict=False)
  ]


def memory(pace: Pace) -> list[int]:
  """Returns peak bytes at each chunk: device memory if reported, else host."""
  return [x["peak_device_bytes"] or x["peak_rss_bytes"] for x in pace]


def summary(pace: Pace) -> str:
  """Formats the speed of both halves and the growth of memory as one line."""
  if len(pace) < 2:
    return f"{seconds(pace)[0]:.3f} s per frame"
  half = len(pace) // 2
  parts = []
  for name, part in (("first", slice(half)), ("second", slice(half, None))):
    found = seconds(pace)[part]
    parts.append(
      f"{sum(found) / len(found):.3f} s per frame in the {name} half"
    )
  grown = memory(pace)[-1] - memory(pace)[half]
  return ", ".join(parts) + f", memory then grew by {grown / 2**20:.1f} MiB"


def plot(pace: Pace, path: pathlib.Path) -> None:
  """Plots seconds per frame and peak memory against frames as PNG."""
  picture = figure.Figure(figsize=(7, 4), layout="tight")
  upper, lower = picture.subplots(2, sharex=True)
  frames = [x["frames"] for x in pace]
  upper.plot(frames, seconds(pace), marker=".")
  upper.set_ylabel("seconds per frame")
  lower.plot(frames, [x / 2**30 for x in memory(pace)], marker=".")
  lower.set_ylabel("peak memory, GiB")
  lower.set_xlabel("frames")
  for axes in (upper, lower):
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
  picture.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
  cli.run(sys.modules[__name__])
