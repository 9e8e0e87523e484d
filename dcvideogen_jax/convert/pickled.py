"""Reads the tensors of a `.pt` file without torch.

A pickle is a program, and the ones that hold weights never need more than
dictionaries of tensors: the unpickler here knows those and nothing else.
"""

import collections
import itertools
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import reading

_STORAGES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
  """A flat array inside the archive."""

  dtype: np.dtype
  size: int
  read: reading.Elements


def _rebuild_tensor(storage, offset, shape, strides, *_):
  shape, strides = tuple(shape), tuple(strides)
  needed = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if math.prod(shape) and offset + needed > storage.size:
    raise ValueError("a tensor reaches outside its storage")
  products = itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1)
  row_major = tuple(products)[::-1][: len(shape)]
  if all(
    n == 1 or s == r for n, s, r in zip(shape, strides, row_major, strict=True)
  ):

    def elements(start, stop, memory=None):
      return storage.read(offset + start, offset + stop, memory)

    return reading.tensor(shape, storage.dtype, elements)

  def read():
    flat = storage.read(offset, offset + needed)
    steps = [s * storage.dtype.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps)

  return reading.Tensor(shape, storage.dtype, read)


class _WeightsUnpickler(pickle.Unpickler):
  """Builds dictionaries of tensors; refuses every other object."""

  def __init__(self, file, path, storage):
    super().__init__(file)
    self._path = path
    self._storage = storage

  def find_class(self, module, name):
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    allowed = {
      ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
      ("collections", "OrderedDict"): collections.OrderedDict,
    }
    if (module, name) not in allowed:
      raise errors.UserError(
        f"{self._path} was refused: it asks for {module}.{name}, "
        "and a checkpoint of weights holds tensors only"
      )
    return allowed[module, name]

  def persistent_load(self, pid):
    _, dtype, key, _, count = pid
    return self._storage(dtype, str(key), count)


def open_torch(path: pathlib.Path) -> dict[str, reading.Tensor]:
  """Lists the tensors of what `torch.save` wrote.

  Besides a state dict alone, the trainers' files are known: averaged weights
  (`ema_model_state_dict`, a single entry) replace those of the same name in
  `model_state_dict`, which may hold more: what was not trained.

  Raises:
    errors.UserError: if the file is damaged or holds anything but tensors.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      loaded = _unpickle(path, archive)
  except errors.UserError:
    raise
  except zipfile.BadZipFile as e:
    raise errors.UserError(
      f"{path} is truncated or not a PyTorch checkpoint "
      f"(the zip format of torch.save since 1.6): {e}"
    ) from e
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
    raise errors.UserError(f"{path} is not a readable checkpoint: {e}") from e
  except (pickle.UnpicklingError, EOFError, struct.error, OSError) as e:
    raise errors.UserError(f"{path} is damaged: {e}") from e
  return _state_dict(path, loaded)


def _unpickle(path: pathlib.Path, archive: zipfile.ZipFile) -> Any:
  members = {info.filename: info for info in archive.infolist()}
  (pickled,) = [name for name in members if name.endswith("/data.pkl")]
  root = pickled.removesuffix("data.pkl")

  def storage(dtype, key, count):
    info = members[f"{root}data/{key}"]
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"{info.filename} is compressed")
    if info.file_size < count * dtype.itemsize:
      raise ValueError(f"{info.filename} is too short")
    offset = _data_offset(path, info)
    return _Storage(dtype, count, reading.reader(path, offset, dtype))

  if members.get(f"{root}byteorder") and (
    archive.read(f"{root}byteorder") != b"little"
  ):
    raise ValueError("it is big-endian")
  with archive.open(pickled) as file:
    return _WeightsUnpickler(file, path, storage).load()


def _data_offset(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
  """Where a stored member's bytes begin."""
  with path.open("rb") as file:
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
  return info.header_offset + 30 + name + extra


def _state_dict(path: pathlib.Path, loaded: Any) -> dict[str, reading.Tensor]:
  """Finds the weights in what a `.pt` file holds."""
  found = loaded
  if isinstance(found, Mapping):
    for name in ("model_state_dict", "state_dict"):
      found = found.get(name, found)
    if "ema_model_state_dict" in loaded:
      averages = loaded["ema_model_state_dict"]
      if not isinstance(averages, Mapping) or len(averages) != 1:
        raise errors.UserError(
          f"{path}: expected a single entry in ema_model_state_dict"
        )
      (averaged,) = averages.values()
      found = averaged if found is loaded else {**found, **averaged}
  if not isinstance(found, Mapping):
    raise errors.UserError(
      f"{path}: expected a dictionary of tensors, found {type(found).__name__}"
    )
  if others := [
    name for name, t in found.items() if not isinstance(t, reading.Tensor)
  ]:
    raise errors.UserError(f"{path}: {others[0]!r} is not a tensor")
  return dict(found)
