"""Flicker at the borders of chunks and bands.

An autoencoder that works in chunks of frames, or in bands of rows or columns,
can leave a step where two of them meet. The definitions are this library's own.
With a reference the step is that of the error: the difference of the errors of
two neighbouring frames, rows or columns, as root mean square in grey levels of
255. Without one it is that of the video itself, whose motion and edges then
count at borders and elsewhere alike. A ratio of 1 shows no flicker.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from dcvideogen_jax import errors

_AXES = {"frames": 0, "rows": 1, "columns": 2}


class Steps(NamedTuple):
  """The steps between neighbours.

  Attributes:
    border: root mean square of the steps at borders, in grey levels of 255.
    elsewhere: that of all other steps.
    ratio: border / elsewhere; 1 if both are 0.
    curve: each step; entry i is the one before frame, row or column i + 1.
  """

  border: float
  elsewhere: float
  ratio: float
  curve: Float64[np.ndarray, " n"]


def chunk_borders(
  video: UInt8[np.ndarray, "t h w 3"],
  chunk: int,
  reference: UInt8[np.ndarray, "t h w 3"] | None = None,
  *,
  offset: int = 0,
) -> Steps:
  """Measures the steps between frames.

  Args:
    video: the frames.
    chunk: frames of a chunk.
    reference: the original frames, if any.
    offset: first frame of the second chunk, modulo `chunk`, if the first chunk
      has another length than the others; 1 for Wan's autoencoder.

  Raises:
    ValueError: if the shapes differ.
    errors.UserError: if the video has no border, or no other step.
  """
  frames = range(1, len(video))
  borders = [i for i in frames if (i - offset) % chunk == 0]
  return _steps("frames", video, borders, reference)


def row_borders(
  video: UInt8[np.ndarray, "t h w 3"],
  rows: Collection[int],
  reference: UInt8[np.ndarray, "t h w 3"] | None = None,
) -> Steps:
  """Measures the steps between rows.

  Args:
    video: the frames.
    rows: first row of each band; 0 is no border.
    reference: the original frames, if any.

  Raises:
    ValueError: if the shapes differ.
    errors.UserError: if there is no border, or no other step.
  """
  return _steps("rows", video, rows, reference)


def column_borders(
  video: UInt8[np.ndarray, "t h w 3"],
  columns: Collection[int],
  reference: UInt8[np.ndarray, "t h w 3"] | None = None,
) -> Steps:
  """Measures the steps between columns, as `row_borders` does for rows.

  Args:
    video: the frames.
    columns: first column of each band; 0 is no border.
    reference: the original frames, if any.

  Raises:
    ValueError: if the shapes differ.
    errors.UserError: if there is no border, or no other step.
  """
  return _steps("columns", video, columns, reference)


def _steps(what, video, borders, reference) -> Steps:
  axis = _AXES[what]
  length = video.shape[axis]
  if reference is not None and reference.shape != video.shape:
    raise ValueError(
      f"videos must have equal shapes, not {video.shape} and {reference.shape}"
    )
  at_border = np.zeros(length - 1, bool)
  at_border[[i - 1 for i in borders if 0 < i < length]] = True
  if at_border.all() or not at_border.any():
    raise errors.UserError(
      f"flicker needs borders and other steps between {length} {what}, found"
      f" {at_border.sum()} borders"
    )
  squares = np.array(
    [_square(video, reference, axis, i) for i in range(1, length)]
  )
  border, elsewhere = (
    float(np.sqrt(squares[mask].mean())) for mask in (at_border, ~at_border)
  )
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = 1.0 if border == elsewhere else float(np.divide(border, elsewhere))
  return Steps(border, elsewhere, ratio, np.sqrt(squares))


def _square(video, reference, axis, i) -> float:
  """Mean square of the step before position `i` of an axis."""

  def at(position):
    place = (slice(None),) * axis + (position,)
    values = video[place].astype(np.int32)
    return values if reference is None else values - reference[place]

  return float(np.mean(np.square(at(i) - at(i - 1)), dtype=np.float64))
