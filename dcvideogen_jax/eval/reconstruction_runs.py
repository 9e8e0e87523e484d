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
from dcvideogen_jax.eval import clip_figures, contact_sheet, official_clips

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
    # Those of the originals have no model.
    self.rows: dict[tuple[str | None, str], dict[str, Any]] = {}
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
  networks: clip_figures.Networks = clip_figures.NONE,
) -> None:
  """Measures the clips of an autoencoder that are not in the record yet.

  Args:
    label: names the autoencoder.
    reconstruct: of `reconstructor`.
    clips: the clips.
    record: gets a row for each clip, with "shape", the metrics of
      `clip_figures.by_frame` and the features of `clip_figures.features`; and a
      row with the features of the original, which all autoencoders share.
    rounding: of the ground truth.
    networks: of the metrics that need one.

  Raises:
    errors.UserError: if a clip is too small or too short for a network.
  """
  left = [
    i for i, name in enumerate(clips.names) if (label, name) not in record.rows
  ]
  for i in tqdm.tqdm(left, desc=label, unit="clip", disable=None):
    name = clips.names[i]
    video = clips.read(i)
    truth = official_clips.round_truth(video, rounding)
    i3d = networks.i3d
    if i3d is not None and (None, name) not in record.rows:
      found = clip_figures.features(truth, i3d)
      record.add({"model": None, "clip": name, **found})
    output = reconstruct(video)
    row = {"model": label, "clip": name, "shape": [*video.shape]}
    row |= clip_figures.by_frame(truth, output, networks.lpips)
    if i3d is not None:
      row |= clip_figures.features(output, i3d)
    record.add(row)


def summary(label: str, clips: Clips, record: Record) -> dict[str, Any]:
  """Returns the figures of an autoencoder, ready for JSON.

  As in the official evaluation, frames that are exact are left out of the mean
  of PSNR, and counted. A metric that not all clips have is left out.

  Args:
    label: names the autoencoder.
    clips: all of which are in the record.
    record: the rows.
  """
  rows = [record.rows[label, name] for name in clips.names]
  psnr = [x for row in rows for x in row["psnr"]]
  found: dict[str, Any] = {
    "clips": len(rows),
    "shape": rows[-1]["shape"],
    "frames": len(psnr),
    "exact_frames": psnr.count(None),
  }
  for name in clip_figures.BY_FRAME:
    if all(name in row for row in rows):
      found |= _averages(name, [row[name] for row in rows])
  if all(clip_figures.WHOLE in row for row in rows):
    originals = [record.rows[None, name] for name in clips.names]
    found |= clip_figures.distances(originals, rows)
  return found


def _averages(
  name: str, values: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
  """Returns the means of a metric whose values are by clip and frame."""
  by_clip = [_mean(frames) for frames in values]
  longest = max(len(frames) for frames in values)
  return {
    name: _mean([x for frames in values for x in frames]),
    f"{name}_std_over_clips": _spread(by_clip),
    f"{name}_by_clip": by_clip,
    f"{name}_by_frame": [
      _mean([frames[t] for frames in values if t < len(frames)])
      for t in range(longest)
    ],
  }


# The columns of a table: key, heading, digits.
_COLUMNS = (
  ("psnr", "PSNR, dB", 4),
  ("psnr_std_over_clips", "spread over clips", 2),
  ("ssim", "SSIM", 4),
  ("ms_ssim", "MS-SSIM", 4),
  ("lpips", "LPIPS", 4),
  ("lpips_std_over_clips", "spread over clips", 4),
  (clip_figures.WHOLE, "FVD, whole clips", 2),
  (clip_figures.WINDOWS, f"FVD, windows of {clip_figures.WINDOW}", 2),
  ("exact_frames", "exact frames", 0),
)


def markdown(about: Mapping[str, Any], models: Mapping[str, Any]) -> str:
  """Returns a table of the autoencoders, below a line on the clips.

  It has a column for each metric that was measured, and sentences on FVD.
  """
  told = ", ".join(f"{key} {value}" for key, value in about.items())
  (first, *_) = models.values()
  columns = [column for column in _COLUMNS if column[0] in first]
  rows = [
    f"{told}.\n",
    " | ".join(["| autoencoder", *(text for _, text, _ in columns)]) + " |",
    "|---" * (1 + len(columns)) + "|",
  ]
  for label, found in models.items():
    numbers = (_number(found.get(key), digits) for key, _, digits in columns)
    rows.append(" | ".join([f"| {label}", *numbers]) + " |")
  if remarks := fvd_remarks(first):
    rows += ["", *remarks]
  return "\n".join(rows) + "\n"


def sizes(shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
  """Returns frames and size of clips, `t h w 3` each, for a report."""
  frames = sorted({shape[0] for shape in shapes})
  areas = sorted({(shape[1], shape[2]) for shape in shapes})
  return {
    "clips": len(shapes),
    "frames": f"{frames[0]} to {frames[-1]}" if frames[1:] else frames[0],
    "size": ", ".join(f"{height} x {width}" for height, width in areas[:4])
    + (", ..." if areas[4:] else ""),
  }


def fvd_remarks(found: Mapping[str, Any]) -> list[str]:
  """Returns sentences on the N of FVD, of a `summary`; none without FVD."""
  kinds = (
    (clip_figures.WHOLE, "whole clips", "clips"),
    (
      clip_figures.WINDOWS,
      f"windows of {clip_figures.WINDOW} frames",
      "windows",
    ),
  )
  remarks = []
  for key, kind, unit in kinds:
    if key not in found:
      continue
    count = found[f"{key}_n"]
    remark = f"FVD of {kind}: N = {count}; compare at the same N only."
    if count < 2:
      remark = (
        f"FVD of {kind} has no meaning with N = {count}: it needs at least two "
        f"{unit}."
      )
    remarks.append(remark)
  return remarks


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
