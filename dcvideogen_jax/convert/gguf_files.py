"""Reads the tensors of a GGUF file, on demand and in pieces.

The container is that of ggml, versions 2 and 3, as the package gguf 0.19.0
reads it. The conventions are those of city96/ComfyUI-GGUF (commit 795e451):
tensors have the names of the model's own library, and one whose rows do not
fill whole blocks has another shape in the file and its own in the metadata.
Text encoders have the names of llama.cpp.
"""

import math
import os
import pathlib
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import (
  gguf_blocks,
  quantised_tensors,
  reading,
  umt5,
)

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Number of a kind of metadata -> struct format; texts and lists come apart.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# Bytes of the longest name, and of the longest text that is kept.
_LONGEST = 1 << 16
# Axes of a tensor, and texts in a list, which may be a vocabulary.
_MOST_AXES, _MOST_TEXTS = 8, 1 << 24
_ALIGNMENT = 32
_SHAPE_KEY = "comfy.gguf.orig_shape."
_TEXT_ENCODERS = ("t5", "t5encoder")
# The convolution of Wan's transformer, whose five axes llama.cpp cannot
# quantise: files that are not finished lack it.
_PATCHES = "patch_embedding.weight"


class _Entry(NamedTuple):
  """A tensor as the header lists it; the shape is that of numpy's order."""

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int


def open_gguf(path: pathlib.Path) -> dict[str, reading.Tensor]:
  """Lists the tensors of a `.gguf` file.

  Raises:
    errors.UserError: if the header is damaged or does not describe the file, if
      a tensor has a type that is not read, or if it is a transformer's file
      that was not finished.
  """
  try:
    with path.open("rb") as file:
      facts, entries, start = _Header(file, os.path.getsize(path)).read()
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, struct.error) as e:
    raise _damaged(path, e) from e
  _require_finished(path, facts, entries)
  try:
    _check_places(entries, start, facts["general.alignment"], path)
    tensors = {
      entry.name: _tensor(path, entry, _shape(entry, facts), start)
      for entry in entries
    }
  except ValueError as e:
    raise _damaged(path, e) from e
  if facts.get("general.architecture") in _TEXT_ENCODERS:
    return {umt5.from_llama_cpp(n): tensor for n, tensor in tensors.items()}
  return tensors


def _damaged(path: pathlib.Path, e: Exception) -> errors.UserError:
  return errors.UserError(f"{path} is not a whole GGUF file: {e}")


def _shape(entry: _Entry, facts: dict[str, Any]) -> tuple[int, ...]:
  """Returns the shape that a tensor has in its model."""
  shape = facts.get(_SHAPE_KEY + entry.name) or entry.shape
  if math.prod(shape) != math.prod(entry.shape):
    raise ValueError(
      f"{errors.brief(entry.name)} has shape {entry.shape}, which cannot become"
      f" {shape}"
    )
  return shape


def _check_places(
  entries: list[_Entry], start: int, alignment: int, path: pathlib.Path
) -> None:
  """Raises ValueError unless aligned tensors follow each other in the file."""
  at = 0
  if len({entry.name for entry in entries}) < len(entries):
    raise ValueError("it has two tensors of the same name")
  for entry in entries:
    where = errors.brief(entry.name)
    if entry.offset != at:
      raise ValueError(f"{where} begins at {entry.offset}, expected {at}")
    end = at + _size(entry)
    if start + end > os.path.getsize(path):
      raise ValueError(f"{where} ends outside the file")
    at = -(-end // alignment) * alignment


def _size(entry: _Entry) -> int:
  """Returns the bytes of a tensor."""
  count = math.prod(entry.shape)
  if entry.kind in gguf_blocks.PLAIN:
    return count * gguf_blocks.PLAIN[entry.kind].itemsize
  block = gguf_blocks.BLOCKS[entry.kind]
  return count // block.numbers * block.size


def _require_finished(
  path: pathlib.Path, facts: dict[str, Any], entries: list[_Entry]
) -> None:
  names = [entry.name for entry in entries]
  if facts.get("general.architecture") == "wan" and not any(
    name.endswith(_PATCHES) for name in names
  ):
    raise errors.UserError(
      f"{path} is a half-made GGUF file: it lacks {_PATCHES}, which llama.cpp"
      " cannot quantise; expected the file that fix_5d_tensors.py of"
      " ComfyUI-GGUF makes of it"
    )
  for entry in entries:
    if name := gguf_blocks.OTHERS.get(entry.kind):
      known = [t.name for t in gguf_blocks.BLOCKS.values()]
      raise errors.UserError(
        f"{path}: {errors.brief(entry.name)} is quantised to {name}, which is"
        f" not read here: expected F32, F16, BF16, {', '.join(known)}"
      )


def _tensor(
  path: pathlib.Path, entry: _Entry, shape: tuple[int, ...], start: int
) -> reading.Tensor:
  """Makes a tensor; the data of all begins at byte `start` of the file."""
  offset = start + entry.offset
  if entry.kind in gguf_blocks.PLAIN:
    dtype = gguf_blocks.PLAIN[entry.kind]
    return reading.tensor(shape, dtype, reading.reader(path, offset, dtype))
  kind = gguf_blocks.BLOCKS[entry.kind]
  read = reading.reader(path, offset, np.dtype(np.uint8))
  columns = math.prod(shape[1:])
  # Groups of numbers follow the flat tensor; a row may begin within one.
  width = math.gcd(kind.group, columns)

  def rows(start: int, stop: int) -> quantised_tensors.Quantised:
    begin, end = start * columns, stop * columns
    first, last = begin // kind.numbers, -(-end // kind.numbers)
    raw = read(first * kind.size, last * kind.size, None)
    numbers = kind.read(raw.reshape(-1, kind.size))
    begin, end = (at - first * kind.numbers for at in (begin, end))

    def groups(x):
      if x is None:
        return None
      flat = np.repeat(x.reshape(-1), kind.group // width)
      flat = flat[begin // width : end // width]
      return flat.reshape(stop - start, -1)

    values = numbers.values.reshape(-1)[begin:end]
    return quantised_tensors.Quantised(
      values.reshape(stop - start, columns),
      groups(numbers.scales),
      (1, width),
      groups(numbers.offsets),
    )

  return reading.dequantised(
    shape, quantised_tensors.Stored(kind.name, kind.dtype, (1, width), rows)
  )


class _Header:
  """Reads the header of a file; ValueError says what is damaged."""

  def __init__(self, file: BinaryIO, size: int):
    self._file, self._size = file, size

  def read(self) -> tuple[dict[str, Any], list[_Entry], int]:
    """Returns facts by name, the tensors, and the offset of the data."""
    if self._bytes(4) != MAGIC:
      raise ValueError("it does not begin with GGUF")
    version = self._number("I")
    if version not in _VERSIONS:
      big = version >> 16 and not version & 0xFFFF
      what = "big-endian" if big else f"of version {version}"
      raise ValueError(f"it is {what}, expected little-endian and version 2, 3")
    tensors, facts = self._count(24), self._count(12)
    found: dict[str, Any] = {}
    for _ in range(facts):
      name = self._text()
      if name in found:
        raise ValueError(f"it has {errors.brief(name)!r} twice")
      found[name] = self._value(self._number("I"), name)
    entries = [self._entry() for _ in range(tensors)]
    alignment = found.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20:
      raise ValueError(f"general.alignment is {alignment!r}")
    if alignment & (alignment - 1):
      raise ValueError(f"general.alignment is {alignment}, no power of two")
    found["general.alignment"] = alignment
    start = -(-self._file.tell() // alignment) * alignment
    return found, entries, start

  def _bytes(self, length: int) -> bytes:
    found = self._file.read(length)
    if len(found) < length:
      raise ValueError("it ends within its header")
    return found

  def _number(self, form: str) -> Any:
    (number,) = struct.unpack("<" + form, self._bytes(struct.calcsize(form)))
    return number

  def _count(self, least: int) -> int:
    """Reads a number of things that take `least` bytes each, or more."""
    count = self._number("Q")
    if count * least > self._size - self._file.tell():
      raise ValueError(f"it has {count} entries, more than fit into it")
    return count

  def _text(self) -> str:
    length = self._count(1)
    if length > _LONGEST:
      raise ValueError(f"it has a name of {length} characters")
    return self._bytes(length).decode()

  def _value(self, kind: int, name: str) -> Any:
    """Reads a value; of texts and lists only those that are needed."""
    if kind in _SCALARS:
      return self._number(_SCALARS[kind])
    if kind == _TEXT and name == "general.architecture":
      return self._text()
    if kind == _TEXT:
      self._file.seek(self._count(1), os.SEEK_CUR)
      return None
    if kind != _LIST:
      raise ValueError(f"{errors.brief(name)} is of kind {kind}, not known")
    inner = self._number("I")
    if inner in _SCALARS:
      width = struct.calcsize(_SCALARS[inner])
      count = self._count(width)
      if name.startswith(_SHAPE_KEY):
        return self._shape(
          [self._number(_SCALARS[inner]) for _ in range(count)]
        )
      self._file.seek(count * width, os.SEEK_CUR)
    elif inner == _TEXT:
      count = self._count(8)
      if count > _MOST_TEXTS:
        raise ValueError(f"{errors.brief(name)} has {count} texts")
      for _ in range(count):
        self._file.seek(self._count(1), os.SEEK_CUR)
    else:
      raise ValueError(f"{errors.brief(name)} is a list of kind {inner}")
    return None

  def _shape(self, axes: list[Any]) -> tuple[int, ...]:
    if len(axes) > _MOST_AXES or not reading.is_shape(axes):
      raise ValueError(f"{axes} is no shape")
    return tuple(axes)

  def _entry(self) -> _Entry:
    name = self._text()
    count = self._number("I")
    if count > _MOST_AXES:
      raise ValueError(f"{errors.brief(name)} has {count} axes")
    shape = self._shape([self._number("Q") for _ in range(count)])
    kind, offset = self._number("I"), self._number("Q")
    if block := gguf_blocks.BLOCKS.get(kind):
      if not shape or shape[0] % block.numbers:
        raise ValueError(
          f"{errors.brief(name)} has rows of {shape[:1]} numbers, which do not"
          f" fill blocks of {block.name}"
        )
    elif kind not in gguf_blocks.PLAIN and kind not in gguf_blocks.OTHERS:
      raise ValueError(f"{errors.brief(name)} has type {kind}, not known")
    return _Entry(name, shape[::-1], kind, offset)
