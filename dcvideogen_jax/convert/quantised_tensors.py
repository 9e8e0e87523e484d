"""Weights of few bits: the one form that every quantised file is read into.

A weight is a matrix of small numbers, scales that blocks of them share and, in
some formats, offsets. It stands in the order of the PyTorch tensor, (out, in),
with the axes after the first one flattened.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped


class Quantised(NamedTuple):
  """Rows of a quantised weight: `values * scales + offsets`, block by block.

  Attributes:
    values: the small numbers, one per element, in an integer or a small
      floating-point dtype.
    scales: one per block.
    block: rows and columns that share a scale. Blocks start at the first row
      and column; the last ones may be cut.
    offsets: one per block; None stands for zeros.
  """

  values: Shaped[np.ndarray, "rows columns"]
  scales: Float32[np.ndarray, "row_blocks column_blocks"]
  block: tuple[int, int]
  offsets: Float32[np.ndarray, "row_blocks column_blocks"] | None = None

  def dequantise(
    self, out: Float32[np.ndarray, "rows columns"] | None = None
  ) -> Float32[np.ndarray, "rows columns"]:
    """Returns the weights; every product and sum is rounded to float32.

    Args:
      out: array that the weights are written to; None makes one.
    """
    columns = self.values.shape[1]
    if out is None:
      out = np.empty(self.values.shape, np.float32)
    out[...] = self.values
    width = self.block[1]
    scales, offsets = self._per_row(self.scales), None
    if self.offsets is not None:
      offsets = self._per_row(self.offsets)
    whole = columns // width * width
    for first, last in ((0, whole), (whole, columns)):
      if first == last:
        continue
      blocks = slice(first // width, -(-last // width))
      shape = (len(out), -1, min(width, last - first))
      part = out[:, first:last].reshape(shape)  # A view.
      part *= scales[:, blocks, None]
      if offsets is not None:
        part += offsets[:, blocks, None]
    return out

  def _per_row(self, x: np.ndarray) -> np.ndarray:
    """Repeats the values of blocks for each of their rows."""
    return np.repeat(x, self.block[0], 0)[: len(self.values)]

  def take(self, start: int, stop: int) -> "Quantised":
    """Returns the rows from `start` up to `stop`, not included."""
    height, width = self.block
    if start % height and stop - start > height - start % height:
      # The first block is cut, so that every row gets its own scales.
      at: slice | np.ndarray = np.arange(start, stop) // height
      height = 1
    else:
      at = slice(start // height, -(-stop // height))
    return Quantised(
      self.values[start:stop],
      self.scales[at],
      (height, width),
      None if self.offsets is None else self.offsets[at],
    )


class Stored(NamedTuple):
  """How a file holds a quantised weight, which has not been read yet.

  Attributes:
    format: name of the format, such as "Q4_K" or "scaled float8_e4m3fn".
    dtype: dtype of `Quantised.values`.
    block: rows and columns that share a scale; that of all rows together.
    rows: reads the rows from the first argument up to the second, not included.
      The blocks of the result may have fewer rows than `block`.
  """

  format: str
  dtype: np.dtype
  block: tuple[int, int]
  rows: Callable[[int, int], Quantised]
