"""Measures autoencoders on many clips, one after the other, and resumes.

Each measured clip is a line of a file beside the report. A run that was stopped
reads the file and goes on with the clips that are left.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from flax import linen as nn

from dcvideogen_jax import errors, levels
from dcvideogen_jax.eval import contact_sheet, images, official_clips

_WORST, _BEST = 4, 4


class Clips(NamedTuple):
  """Clips to measure.

  Attributes:
    names: one for each clip.
    read: returns a clip by its number, uint8 `t h w 3`.
    about: what a table has to say of them, ready for JSON.
  """

  names: Sequence[str]
  read: Callable[[int], np.ndarray]
  about: Mapping[str, Any]


def reconstructor(
  module: nn.Module, variables: Any, rounding: str
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from a clip to its reconstruction, both uint8.

  The clip is encoded and decoded whole, in the module's own dtype.

  Args:
    module: an autoencoder with the methods "encode" and "decode".
    variables: its parameters.
    rounding: of `official_clips.to_levels`.
  """

  @functools.partial(jax.jit, static_argnums=1)
  def run(video, frames):
    latents = module.apply(variables, levels.to_float(video), method="encode")
    return module.apply(variables, latents, method="decode")[:, :frames]

  def reconstruct(video: np.ndarray) -> np.ndarray:
    frames, height, width = video.shape[:3]
    output = np.asarray(run(video[None], frames))[0, :, :height, :width]
    if rounding == "float32":
      return levels.to_uint8(output)
    return official_clips.to_levels(output.astype(np.float32), rounding)

  return reconstruct


class Record:
  """The measured clips of all autoencoders, in a file of JSON lines."""

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    """Reads what an earlier run of the same settings left.

    Args:
      path: the file; need not exist.
      settings: what determines the results, ready for JSON.

    Raises:
      errors.UserError: if the file is of other settings.
    """
    self._path = path
    self.rows: dict[tuple[str, str], dict[str, Any]] = {}
    head = json.dumps({"settings": settings}, sort_keys=True) + "\n"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # The last line has no end if the run was killed while it wrote.
    complete = text[: text.rfind("\n") + 1]
    first, *rest = complete.splitlines(keepends=True) or [head]
    if first != head:
      raise errors.UserError(
        f"{path} is of a run with other settings: expected to go on with the "
        "same ones; remove it to start anew"
      )
    for line in rest:
      row = json.loads(line)
      self.rows[row["model"], row["clip"]] = row
    path.write_text(head + "".join(rest), encoding="utf-8")

  def add(self, row: dict[str, Any]) -> None:
    """Appends a row with "model" and "clip"."""
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
    self.rows[row["model"], row["clip"]] = row

  def remove(self) -> None:
    """Removes the file, once its rows are in the report."""
    self._path.unlink(missing_ok=True)


def measure(
  label: str,
  reconstruct: Callable[[np.ndarray], np.ndarray],
  clips: Clips,
  record: Record,
  rounding: str,
) -> None:
  """Measures the clips of an autoencoder that are not in the record yet.

  Args:
    label: names the autoencoder.
    reconstruct: of `reconstructor`.
    clips: the clips.
    record: gets a row for each clip, with "psnr" (null where a frame is exact)
      and "ssim" per frame, and "shape".
    rounding: of the ground truth.
  """
  left = [
    i for i, name in enumerate(clips.names) if (label, name) not in record.rows
  ]
  for i in tqdm.tqdm(left, desc=label, unit="clip", disable=None):
    video = clips.read(i)
    output = reconstruct(video)
    truth = official_clips.round_truth(video, rounding)
    psnr = images.psnr(truth, output).tolist()
    record.add(
      {
        "model": label,
        "clip": clips.names[i],
        "shape": [*video.shape],
        "psnr": [x if math.isfinite(x) else None for x in psnr],
        "ssim": images.ssim(truth, output).tolist(),
      }
    )


def summary(label: str, clips: Clips, record: Record) -> dict[str, Any]:
  """Returns the figures of an autoencoder, ready for JSON.

  As in the official evaluation, frames that are exact are left out of the mean
  of PSNR, and counted.

  Args:
    label: names the autoencoder.
    clips: all of which are in the record.
    record: the rows.
  """
  rows = [record.rows[label, name] for name in clips.names]
  by_clip = [_mean(row["psnr"]) for row in rows]
  psnr = [x for row in rows for x in row["psnr"]]
  longest = max(len(row["psnr"]) for row in rows)
  return {
    "clips": len(rows),
    "shape": rows[-1]["shape"],
    "frames": len(psnr),
    "psnr": _mean(psnr),
    "exact_frames": psnr.count(None),
    "ssim": _mean([x for row in rows for x in row["ssim"]]),
    "psnr_std_over_clips": _spread(by_clip),
    "psnr_by_clip": by_clip,
    "ssim_by_clip": [_mean(row["ssim"]) for row in rows],
    **{
      f"{name}_by_frame": [
        _mean([row[name][t] for row in rows if t < len(row[name])])
        for t in range(longest)
      ]
      for name in ("psnr", "ssim")
    },
  }


def markdown(about: Mapping[str, Any], models: Mapping[str, Any]) -> str:
  """Returns a table of the autoencoders, below a line on the clips."""
  told = ", ".join(f"{key} {value}" for key, value in about.items())
  rows = [
    f"{told}.\n",
    "| autoencoder | PSNR, dB | spread over clips | SSIM | exact frames |",
    "|---|---|---|---|---|",
  ]
  for label, found in models.items():
    rows.append(
      f"| {label} | {_number(found['psnr'], 4)} | "
      f"{_number(found['psnr_std_over_clips'], 2)} | "
      f"{_number(found['ssim'], 4)} | {found['exact_frames']} |"
    )
  return "\n".join(rows) + "\n"


def picture(
  path: pathlib.Path,
  label: str,
  reconstruct: Callable[[np.ndarray], np.ndarray],
  clips: Clips,
  record: Record,
) -> None:
  """Writes the middle frames of the worst and the best clips as a sheet.

  Args:
    path: ends in .png.
    label, reconstruct, clips, record: of the autoencoder.
  """
  rows = [record.rows[label, name] for name in clips.names]
  means = [_mean(row["psnr"]) for row in rows]
  order = sorted(
    range(len(rows)), key=lambda i: math.inf if means[i] is None else means[i]
  )
  shown = order[:_WORST] + order[max(_WORST, len(order) - _BEST) :]
  columns = []
  for i in shown:
    video = clips.read(i)
    middle = len(video) // 2
    columns.append(
      contact_sheet.comparison(
        f"{clips.names[i][-24:]}: {_number(means[i], 2)} dB",
        video[middle],
        reconstruct(video)[middle],
      )
    )
  title = f"{label}: from the worst to the best clips"
  contact_sheet.write(path, title, columns, contact_sheet.COMPARISON)


def _mean(values: Sequence[float | None]) -> float | None:
  finite = [x for x in values if x is not None]
  return float(np.mean(finite)) if finite else None


def _spread(values: Sequence[float | None]) -> float | None:
  finite = [x for x in values if x is not None]
  return float(np.std(finite, ddof=1)) if len(finite) > 1 else None


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"
