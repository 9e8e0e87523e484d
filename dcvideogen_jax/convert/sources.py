"""Opens the sources of weights: files, directories and mappings.

Every source becomes a dict of `Tensor`s, which know their shape and dtype and
read their data on demand.
"""

import fnmatch
import functools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import documents, errors
from dcvideogen_jax.convert import gguf_files, pickled, reading, tensor_files

Tensor = reading.Tensor
Source = str | os.PathLike[str] | Mapping[str, Any]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"


def open_source(
  source: Source, patterns: Sequence[str] = ()
) -> dict[str, Tensor]:
  """Lists the tensors of a file, a directory or a mapping of arrays.

  Args:
    source: `.safetensors`, `.gguf`, `.pt`, `.pth`, `.bin`, `.ckpt`, the index
      (`.index.json`) of a checkpoint in several files, a directory that holds
      one of these or several `.safetensors`, or a mapping from names to arrays.
    patterns: patterns (`*` for any characters) of file names. If files in a
      directory match, its other files are ignored, because repositories keep
      several models side by side.

  Raises:
    errors.UserError: if the source does not exist or holds no checkpoint, or if
      files are missing, are damaged, disagree with their index, or hold
      anything but tensors.
  """
  if isinstance(source, Mapping):
    arrays = {name: np.asarray(array) for name, array in source.items()}
    return {
      name: Tensor(x.shape, x.dtype, functools.partial(np.asarray, x))
      for name, x in arrays.items()
    }
  path = pathlib.Path(source)
  # os.path, because the methods of a path raise if a name is too long.
  if os.path.isdir(path):
    return _open_directory(path, patterns)
  if not os.path.isfile(path):
    raise errors.UserError(
      f"there is no file or directory {errors.brief(str(path))}"
    )
  if path.name.endswith(INDEX_SUFFIX):
    return _open_index(path)
  return _open_file(path)


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    with path.open("rb") as file:
      start = file.read(32)
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror or e}") from e
  if start.startswith(gguf_files.MAGIC):
    return gguf_files.open_gguf(path)
  if what := documents.stand_in(start):
    raise errors.UserError(f"{path} {what}")
  if path.suffix == ".safetensors":
    return tensor_files.open_safetensors(path)
  if path.suffix in _TORCH_SUFFIXES:
    return pickled.open_torch(path)
  raise errors.UserError(
    f"{path} is not a checkpoint: expected .pt, .pth, .gguf or .safetensors"
  )


def told(source: Source) -> str:
  """Returns the name of a source for messages."""
  if isinstance(source, Mapping):
    return "the mapping"
  return errors.brief(str(source), 300)


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the metadata of a safetensors file's header, texts by name.

  Raises:
    errors.UserError: if the file is damaged.
  """
  found = tensor_files.read_header(path)[0].get("__metadata__") or {}
  if not isinstance(found, dict):
    raise errors.UserError(f"{path} is not a whole safetensors file: metadata")
  return found


def _open_directory(
  directory: pathlib.Path, patterns: Sequence[str]
) -> dict[str, Tensor]:
  files = sorted(path for path in directory.iterdir() if path.is_file())
  files = [
    path
    for path in files
    if any(fnmatch.fnmatchcase(path.name, p) for p in patterns)
  ] or files
  if indices := _ending(files, INDEX_SUFFIX):
    return _open_index(_only(directory, indices))
  if files_here := _ending(files, ".safetensors"):
    return _together(files_here)
  if files_here := _ending(files, *_TORCH_SUFFIXES) or _ending(files, ".gguf"):
    return _open_file(_only(directory, files_here))
  inside = sorted(
    folder.name
    for folder in directory.iterdir()
    if folder.is_dir() and any(folder.glob("*.safetensors"))
  )
  hint = f"; its folders {', '.join(inside)} do: name one" if inside else ""
  raise errors.UserError(
    f"{directory} holds no checkpoint: expected .safetensors, .gguf, .pt or"
    f" .pth{hint}"
  )


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
  origin: dict[str, str] = {}
  for file in files:
    more = _open_file(file)
    if twice := sorted(tensors.keys() & more.keys()):
      raise errors.UserError(
        f"{file} repeats {twice[0]} of {origin[twice[0]]}: name one file"
      )
    tensors.update(more)
    origin.update(dict.fromkeys(more, file.name))
  return tensors


def _open_index(path: pathlib.Path) -> dict[str, Tensor]:
  """Lists the tensors of a checkpoint in several files, as its index does."""
  try:
    where = dict(documents.parse(path.read_bytes())["weight_map"])
    shards = sorted(set(where.values()))
    if not shards:
      raise ValueError("it lists no file")
    if outside := [n for n in shards if not _is_shard(n)]:
      raise ValueError(
        f"{errors.brief(outside[0])!r} is no name of a file of weights beside"
        " it"
      )
  except (ValueError, KeyError, TypeError, OSError) as e:
    raise errors.UserError(f"{path} is not an index of weights: {e!r}") from e
  missing = [n for n in shards if not os.path.isfile(path.parent / n)]
  if missing:
    raise errors.UserError(
      f"{path} lists {len(shards)} files, of which {len(missing)} are missing:"
      f" {_some(missing)}"
    )
  opened = {name: _open_file(path.parent / name) for name in shards}
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


def _is_shard(name: str) -> bool:
  """Whether an index may list the name: a file of weights in its directory."""
  suffixes = (".safetensors", *_TORCH_SUFFIXES)
  return pathlib.PurePath(name).name == name and name.endswith(suffixes)


def _some(names: Sequence[str], most: int = 5) -> str:
  rest = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(map(errors.brief, names[:most])) + rest
