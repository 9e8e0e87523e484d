"""Where weights come from: files, directories and mappings.

Every source becomes a dict of `Tensor`s, which know their shape and dtype and
read their data when asked.
"""

import fnmatch
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.convert import pickled, reading

Tensor = reading.Tensor
Source = str | os.PathLike[str] | Mapping[str, Any]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"


def open_source(
  source: Source, patterns: Sequence[str] = ()
) -> dict[str, Tensor]:
  """Lists the tensors of a file, a directory or a mapping of arrays.

  Args:
    source: `.safetensors`, `.pt`, `.pth`, `.bin`, the index (`.index.json`) of
      a checkpoint in several files, a directory that holds one of them or
      several `.safetensors`, or a mapping from names to arrays.
    patterns: names (`*` for any characters) of the files that count in a
      directory, if it holds any: repositories keep several models side by side.

  Raises:
    errors.UserError: if there is nothing to read, files are missing, damaged
      or disagree with their index, or hold anything but tensors.
  """
  if isinstance(source, Mapping):
    return {name: _in_memory(array) for name, array in source.items()}
  path = pathlib.Path(source)
  if path.is_dir():
    return _open_directory(path, patterns)
  if not path.is_file():
    raise errors.UserError(f"there is no file or directory {path}")
  if path.name.endswith(INDEX_SUFFIX):
    return _open_index(path)
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  if path.suffix in _TORCH_SUFFIXES:
    return pickled.open_torch(path)
  raise errors.UserError(
    f"{path} is not a checkpoint: expected .pt, .pth or .safetensors"
  )


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """The texts, by name, that the header of a safetensors file holds.

  Raises:
    errors.UserError: if the file is damaged.
  """
  found = _header(path)[0].get("__metadata__") or {}
  if not isinstance(found, dict):
    raise errors.UserError(f"{path} is not a whole safetensors file: metadata")
  return found


def _in_memory(array) -> Tensor:
  array = np.asarray(array)
  return Tensor(array.shape, array.dtype, lambda: array)


def _open_directory(
  directory: pathlib.Path, patterns: Sequence[str]
) -> dict[str, Tensor]:
  files = sorted(path for path in directory.iterdir() if path.is_file())
  files = _matching(files, patterns) or files
  if indices := _ending(files, INDEX_SUFFIX):
    return _open_index(_only(directory, indices))
  if files_here := _ending(files, ".safetensors"):
    return _together(files_here)
  if files_here := _ending(files, *_TORCH_SUFFIXES):
    return pickled.open_torch(_only(directory, files_here))
  inside = sorted(
    folder.name
    for folder in directory.iterdir()
    if folder.is_dir() and any(folder.glob("*.safetensors"))
  )
  hint = f"; its folders {', '.join(inside)} do: name one" if inside else ""
  raise errors.UserError(
    f"{directory} holds no checkpoint: expected .safetensors, .pt or .pth{hint}"
  )


def _matching(
  files: Iterable[pathlib.Path], patterns: Sequence[str]
) -> list[pathlib.Path]:
  return [
    path
    for path in files
    if any(fnmatch.fnmatchcase(path.name, p) for p in patterns)
  ]


def _ending(
  files: Iterable[pathlib.Path], *suffixes: str
) -> list[pathlib.Path]:
  return [path for path in files if path.name.endswith(suffixes)]


def _only(
  directory: pathlib.Path, files: Sequence[pathlib.Path]
) -> pathlib.Path:
  if len(files) > 1:
    names = ", ".join(file.name for file in files)
    raise errors.UserError(
      f"{directory} holds several checkpoints, name one: {names}"
    )
  return files[0]


def _together(files: Iterable[pathlib.Path]) -> dict[str, Tensor]:
  tensors: dict[str, Tensor] = {}
  for file in files:
    more = _open_safetensors(file)
    if twice := sorted(tensors.keys() & more.keys()):
      raise errors.UserError(f"{file} repeats {twice[0]} of another file")
    tensors.update(more)
  return tensors


def _open_index(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a checkpoint in several files, as its index has them."""
  try:
    where = dict(json.loads(path.read_text())["weight_map"])
    shards = sorted(set(where.values()))
    if not shards:
      raise ValueError("it lists no file")
    if outside := [n for n in shards if pathlib.PurePath(n).name != n]:
      raise ValueError(f"{outside[0]!r} is no file name")
  except (ValueError, KeyError, TypeError, OSError) as e:
    raise errors.UserError(f"{path} is not an index of weights: {e!r}") from e
  missing = [n for n in shards if not (path.parent / n).is_file()]
  if missing:
    raise errors.UserError(
      f"{path} lists {len(shards)} files, of which {len(missing)} are missing:"
      f" {_some(missing)}"
    )
  opened = {name: open_source(path.parent / name) for name in shards}
  lost = [name for name, shard in where.items() if name not in opened[shard]]
  if lost:
    raise errors.UserError(
      f"{path} places {len(lost)} tensors in files that do not hold them: "
      + _some([f"{name} in {where[name]}" for name in lost])
    )
  unknown = [
    f"{name} of {shard}"
    for shard, tensors in opened.items()
    for name in tensors
    if where.get(name) != shard
  ]
  if unknown:
    raise errors.UserError(
      f"{path} does not list {len(unknown)} tensors of its files: "
      + _some(unknown)
    )
  return {name: opened[shard][name] for name, shard in where.items()}


def _some(names: Sequence[str], most: int = 5) -> str:
  rest = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + rest


# --- safetensors -------------------------------------------------------------

_SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """What a file says of its contents, and where they start."""
  size = path.stat().st_size
  try:
    with path.open("rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      if length > size:
        raise ValueError("header longer than the file")
      return dict(json.loads(file.read(length))), 8 + length
  except (ValueError, TypeError, struct.error) as e:
    raise errors.UserError(
      f"{path} is not a whole safetensors file: {e}"
    ) from e


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  header, start = _header(path)
  size = path.stat().st_size
  tensors = {}
  try:
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
      shape = tuple(entry["shape"])
      first, last = entry["data_offsets"]
      count = math.prod(shape)
      if last - first != count * dtype.itemsize or start + last > size:
        raise ValueError(f"{name} ends outside the file")
      elements = reading.reader(path, start + first, dtype)
      tensors[name] = reading.tensor(shape, dtype, elements)
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"{path} is not a whole safetensors file: {e}"
    ) from e
  return tensors
