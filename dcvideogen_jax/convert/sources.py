"""Where weights come from: files and mappings, read tensor by tensor.

Every source becomes a dict of `Tensor`s, which know their shape and dtype and
read their data when asked, so that a conversion holds one copy of the weights
and one tensor. Files are read, not memory-mapped: pages of a mapping count as
the process's memory for as long as the mapping lives.

`.pt` files are read without torch, by an unpickler that knows tensors and
nothing else: a pickle is a program, and the ones that hold weights never need
more than this.
"""

import collections
import functools
import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dcvideogen_jax import errors


class Tensor(NamedTuple):
  """A named array that has not been read yet."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


Source = str | os.PathLike[str] | Mapping[str, Any]


def open_source(source: Source) -> dict[str, Tensor]:
  """Lists the tensors of a file, a directory or a mapping of arrays.

  Args:
    source: `.pt` or `.pth`, `.safetensors`, a directory that holds one of them
      or several `.safetensors`, or a mapping from names to arrays.

  Raises:
    errors.UserError: if there is nothing to read, the file is damaged, or it
      holds anything but tensors.
  """
  if isinstance(source, Mapping):
    return {name: _in_memory(array) for name, array in source.items()}
  path = pathlib.Path(source)
  if path.is_dir():
    return _open_directory(path)
  if not path.is_file():
    raise errors.UserError(f"there is no file or directory {path}")
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  if path.suffix in (".pt", ".pth"):
    return _open_torch(path)
  raise errors.UserError(
    f"{path} is not a checkpoint: expected .pt, .pth or .safetensors"
  )


def _in_memory(array) -> Tensor:
  array = np.asarray(array)
  return Tensor(array.shape, array.dtype, lambda: array)


def _open_directory(directory: pathlib.Path) -> dict[str, Tensor]:
  files = sorted(directory.glob("*.safetensors"))
  if not files:
    files = sorted([*directory.glob("*.pt"), *directory.glob("*.pth")])
    if len(files) > 1:
      names = ", ".join(file.name for file in files)
      raise errors.UserError(f"{directory} holds several checkpoints: {names}")
  if not files:
    raise errors.UserError(
      f"{directory} holds no checkpoint: expected .safetensors, .pt or .pth"
    )
  tensors: dict[str, Tensor] = {}
  for file in files:
    more = open_source(file)
    if twice := sorted(tensors.keys() & more.keys()):
      raise errors.UserError(f"{file} repeats {twice[0]} of another file")
    tensors.update(more)
  return tensors


def _reader(
  path: pathlib.Path, offset: int, dtype: np.dtype, count: int
) -> Callable[[], np.ndarray]:
  """Reads `count` elements at `offset` of a file."""

  def read() -> np.ndarray:
    with path.open("rb") as file:
      file.seek(offset)
      array = np.empty(count, dtype)
      if file.readinto(array.view(np.uint8).data) != array.nbytes:
        raise errors.UserError(f"{path} is truncated")
      return array

  return read


def _reshaped(
  read: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
  return read().reshape(shape)


# --- safetensors -------------------------------------------------------------

_SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
}


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  size = path.stat().st_size
  try:
    with path.open("rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      if length > size:
        raise ValueError("header longer than the file")
      header = json.loads(file.read(length))
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
      shape = tuple(entry["shape"])
      first, last = entry["data_offsets"]
      count = math.prod(shape)
      if last - first != count * dtype.itemsize or start + last > size:
        raise ValueError(f"{name} ends outside the file")
      read = _reader(path, start + first, dtype, count)
      tensors[name] = Tensor(
        shape, dtype, functools.partial(_reshaped, read, shape)
      )
  except (ValueError, KeyError, TypeError, struct.error) as e:
    raise errors.UserError(
      f"{path} is not a whole safetensors file: {e}"
    ) from e
  return tensors


# --- torch -------------------------------------------------------------------

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
  read: Callable[[], np.ndarray]


def _rebuild_tensor(storage, offset, shape, strides, *_):
  shape, dtype = tuple(shape), storage.dtype

  def read():
    flat = storage.read()[offset:]
    steps = [s * dtype.itemsize for s in strides]
    needed = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and needed > flat.size:
      raise errors.UserError("a tensor reaches outside its storage")
    return np.lib.stride_tricks.as_strided(flat, shape, steps)

  return Tensor(shape, dtype, read)


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


def _open_torch(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    with zipfile.ZipFile(path) as archive:
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
        return _Storage(dtype, _reader(path, offset, dtype, count))

      if members.get(f"{root}byteorder") and (
        archive.read(f"{root}byteorder") != b"little"
      ):
        raise ValueError("it is big-endian")
      with archive.open(pickled) as file:
        loaded = _WeightsUnpickler(file, path, storage).load()
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


def _data_offset(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
  """Where a stored member's bytes begin."""
  with path.open("rb") as file:
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
  return info.header_offset + 30 + name + extra


def _state_dict(path: pathlib.Path, loaded: Any) -> dict[str, Tensor]:
  """Finds the weights in what a `.pt` file holds, EMA weights first."""
  found = loaded
  if isinstance(found, Mapping) and "ema_model_state_dict" in found:
    averages = found["ema_model_state_dict"]
    if not isinstance(averages, Mapping) or len(averages) != 1:
      raise errors.UserError(
        f"{path}: expected a single entry in ema_model_state_dict"
      )
    (found,) = averages.values()
  elif isinstance(found, Mapping):
    for name in ("model_state_dict", "state_dict"):
      found = found.get(name, found)
  if not isinstance(found, Mapping):
    raise errors.UserError(
      f"{path}: expected a dictionary of tensors, found {type(found).__name__}"
    )
  if others := [n for n, t in found.items() if not isinstance(t, Tensor)]:
    raise errors.UserError(f"{path}: {others[0]!r} is not a tensor")
  return dict(found)
