"""Measures autoencoders on many clips, one after the other, and resumes."""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax.eval import (
  autoencoders,
  clip_figures,
  contact_sheet,
  measurements,
  official_clips,
)

_WORST, _BEST = 4, 4


class Clips(NamedTuple):
  """Clips to measure.

  Attributes:
    names: one for each clip.
    read: returns a clip by its number, uint8 `t h w 3`.
    about: what a table has to say of them, ready for JSON.
    pieces: returns the same frames in pieces, for clips that are longer than
      memory; None reads them whole.
  """

  names: Sequence[str]
  read: Callable[[int], np.ndarray]
  about: Mapping[str, Any]
  pieces: Callable[[int], Iterable[np.ndarray]] | None = None


def measure(
  label: str,
  reconstruct: Callable[[np.ndarray], np.ndarray],
  clips: Clips,
  record: measurements.Record,
  rounding: str,
  networks: clip_figures.Networks = clip_figures.NONE,
  windows: bool = True,
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
    windows: whether FVD is of windows too, and not only of whole clips.

  Raises:
    errors.UserError: if a clip is too small or too short for a network.
  """
  left = record.left(label, clips.names)
  for i in tqdm.tqdm(left, desc=label, unit="clip", disable=None):
    name = clips.names[i]
    video = clips.read(i)
    truth = official_clips.round_truth(video, rounding)
    i3d = networks.i3d
    if i3d is not None and (None, name) not in record.rows:
      found = clip_figures.features(truth, i3d, windows)
      record.add({"model": None, "clip": name, **found})
    output = reconstruct(video)
    row = {"model": label, "clip": name, "shape": [*video.shape]}
    row |= clip_figures.by_frame(truth, output, networks.lpips)
    if i3d is not None:
      row |= clip_figures.features(output, i3d, windows)
    record.add(row)


def measure_in_pieces(
  label: str,
  reconstruct: Callable[[Iterable[np.ndarray]], Iterator[autoencoders.Pair]],
  clips: Clips,
  record: measurements.Record,
  rounding: str,
  networks: clip_figures.Networks = clip_figures.NONE,
) -> None:
  """Measures as `measure`, but holds a few frames of a clip at a time.

  Of FVD there are windows only.

  Args:
    label, clips, record, rounding, networks: as for `measure`.
    reconstruct: of `autoencoders.in_pieces`.

  Raises:
    errors.UserError: if a clip is too small for a network.
  """
  left = record.left(label, clips.names)
  for i in tqdm.tqdm(left, desc=label, unit="clip", disable=None):
    name = clips.names[i]
    figures = clip_figures.Pieces(networks)
    given = clips.pieces(i) if clips.pieces else [clips.read(i)]
    for truth, output in reconstruct(given):
      figures.add(official_clips.round_truth(truth, rounding), output)
    original, row = figures.rows()
    if original and (None, name) not in record.rows:
      record.add({"model": None, "clip": name, **original})
    record.add({"model": label, "clip": name, **row})


def summary(
  label: str, clips: Clips, record: measurements.Record
) -> dict[str, Any]:
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
  if all((None, name) in record.rows for name in clips.names):
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
  (f"{clip_figures.WHOLE}_error", "standard error", 2),
  (clip_figures.WINDOWS, f"FVD, windows of {clip_figures.WINDOW}", 2),
  (f"{clip_figures.WINDOWS}_error", "standard error", 2),
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
  record: measurements.Record,
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
