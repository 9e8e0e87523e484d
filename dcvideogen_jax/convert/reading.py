"""Tensors that have not been read yet, and files that are read in pieces.

Files are read, not memory-mapped: pages of a mapping count as the process's
memory for as long as the mapping lives.
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from dcvideogen_jax import errors

# What numpy counts elements and bytes with, with 16 bytes each.
_MOST_ELEMENTS = 1 << 59
_MOST_AXES = 32
# Elements from a first to a last index, not included; into the given bytes, if
# any, which the result then shares.
Elements = Callable[[int, int, np.ndarray | None], np.ndarray]


class Tensor(NamedTuple):
  """An array that has not been read yet.

  Attributes:
    shape: of the array.
    dtype: of the array.
    read: reads all of it.
    rows: as `Elements`, on the first axis; None if a part is no cheaper than
      all of it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  rows: Elements | None = None


def tensor(
  shape: tuple[int, ...], dtype: np.dtype, elements: Elements
) -> Tensor:
  """A row-major array of a reader of its flat elements."""
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


def reader(path: pathlib.Path, offset: int, dtype: np.dtype) -> Elements:
  """Reads elements that are stored from `offset` of a file on."""

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
  """Whether a value is a list of sizes, whose product an index can count."""
  return (
    are_counts(value)
    and len(value) <= _MOST_AXES
    and math.prod(max(n, 1) for n in value) < _MOST_ELEMENTS
  )


def are_counts(value: Any) -> TypeGuard[Sequence[int]]:
  """Whether a value is a list of whole numbers that an index can count to."""
  return isinstance(value, list | tuple) and all(
    type(n) is int and 0 <= n < _MOST_ELEMENTS for n in value
  )
