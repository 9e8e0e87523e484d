"""Tensors that are read on demand, whole or in pieces.

Files are read, not memory-mapped: the pages of a mapping count as the process's
memory as long as the mapping exists.
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import quantised_tensors

# Up to this number, the bytes of elements of 16 bytes fit numpy's int64 index.
_MOST_ELEMENTS = 1 << 59
_MOST_AXES = 32
# (start, stop, memory) -> flat elements from start up to stop, not included. If
# memory, an array of bytes, is given, the result is read into it and shares it.
Elements = Callable[[int, int, np.ndarray | None], np.ndarray]


class Tensor(NamedTuple):
  """An array that has not been read yet.

  Attributes:
    shape: of the array.
    dtype: of the array.
    read: reads the whole array.
    rows: as `Elements`, but for rows of the first axis; None if reading a part
      costs as much as reading the whole array.
    stored: the weight of few bits that the array, of float32, is made from;
      None for other arrays.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  rows: Elements | None = None
  stored: quantised_tensors.Stored | None = None


def tensor(
  shape: tuple[int, ...], dtype: np.dtype, elements: Elements
) -> Tensor:
  """Makes the tensor of a row-major array from a reader of its flat elements.

  Args:
    shape: shape of the array.
    dtype: dtype of the array.
    elements: reads flat elements.
  """
  width = math.prod(shape[1:])

  def rows(start, stop, memory=None):
    flat = elements(start * width, stop * width, memory)
    return flat.reshape(stop - start, *shape[1:])

  return Tensor(
    shape,
    dtype,
    lambda: elements(0, math.prod(shape), None).reshape(shape),
    rows,
  )


def some_rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
  """Reads the rows from `start` up to `stop`, not included."""
  if tensor.rows is None:
    return tensor.read()[start:stop]
  return tensor.rows(start, stop, None)


def dequantised(
  shape: tuple[int, ...], stored: quantised_tensors.Stored
) -> Tensor:
  """Makes the tensor of float32 that a quantised weight stands for.

  Args:
    shape: shape of the tensor.
    stored: the weight; its columns are the axes after the first one.
  """
  count = shape[0] if shape else 1
  width = math.prod(shape[1:])

  def rows(start, stop, memory=None):
    out = None
    if memory is not None:
      size = (stop - start) * width
      out = memory[: 4 * size].view(np.float32).reshape(stop - start, width)
    weights = stored.rows(start, stop).dequantise(out)
    return weights.reshape(stop - start, *shape[1:])

  return Tensor(
    shape,
    np.dtype(np.float32),
    lambda: rows(0, count).reshape(shape),
    rows,
    stored,
  )


def reader(path: pathlib.Path, offset: int, dtype: np.dtype) -> Elements:
  """Returns a reader of the elements that start at an offset of a file.

  Args:
    path: the file.
    offset: first byte of the first element.
    dtype: dtype of the elements.

  Returns:
    The reader. It raises `errors.UserError` if the file cannot be read or is
    truncated.
  """

  def read(start, stop, memory=None):
    size = (stop - start) * dtype.itemsize
    memory = np.empty(size, np.uint8) if memory is None else memory[:size]
    try:
      with path.open("rb") as file:
        file.seek(offset + start * dtype.itemsize)
        found = file.readinto(memory.data)
    except OSError as e:
      raise errors.UserError(f"cannot read {path}: {e.strerror or e}") from e
    if found != size:
      raise errors.UserError(f"{path} is truncated")
    return memory.view(dtype)

  return read


def is_shape(value: Any) -> TypeGuard[Sequence[int]]:
  """Whether a value is a list of axis sizes whose product numpy can index."""
  return (
    are_counts(value)
    and len(value) <= _MOST_AXES
    and math.prod(max(n, 1) for n in value) < _MOST_ELEMENTS
  )


def are_counts(value: Any) -> TypeGuard[Sequence[int]]:
  """Whether a value is a list of whole numbers from 0 that numpy can index."""
  return isinstance(value, list | tuple) and all(
    type(n) is int and 0 <= n < _MOST_ELEMENTS for n in value
  )
