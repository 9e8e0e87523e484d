"""Converted weights kept on disk, so that large models are converted once.

    parts = loading.load(source, load_model=weights_cache.caching(directory))

Published weights are in PyTorch's layouts, layer by layer, and often in a wider
dtype than is used. What `convert.load` made of them is written under our own
names, stacked and in the dtypes that are used, to

    directory/{kind}-{dtype}-{source}-{version}/

where `source` stands for the path and the options of loading, `version` for the
names, sizes and times of the files and for this package. An entry is a
checkpoint like any other, and source.json in it says whose, with a digest of
every weight, by which damage is noticed. A new version of a
source replaces the entry of the old one; any entry may be deleted at any time.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dcvideogen_jax
from dcvideogen_jax import convert, digests, errors, files, tree
from dcvideogen_jax.convert import sources, writing

Loader = Callable[..., tuple[Any, dict[str, Any]]]

# Bytes of a source below which converting it each time takes no time.
MINIMUM = 100_000_000

# What the disk must have free, in sizes of an entry.
_ROOM = 2

_ABOUT = "source.json"


def caching(
  directory: str | os.PathLike[str],
  minimum: int = MINIMUM,
  load: Loader = convert.load,
) -> Loader:
  """A function like `convert.load` that keeps what it converts.

  It gives the same, bit for bit. Nothing is kept of mappings, of small sources,
  of weights that are spread over several processes, or where the disk has not
  twice the room that is needed. A damaged entry is made anew. Several processes
  may use the directory at the same time.

  Args:
    directory: of the entries; made when it is needed.
    minimum: bytes that the files of a source have at least to be kept.
    load: what converts.
  """

  def load_cached(
    kind: str,
    source: sources.Source,
    config: str | Mapping[str, Any] | None = None,
    dtype: jnp.dtype | None = None,
    sharding: Any = None,
    merge_lora: bool = True,
  ) -> tuple[Any, dict[str, Any]]:
    found = _files(kind, source)
    direct = functools.partial(
      load, kind, source, config, dtype, sharding, merge_lora
    )
    if not found or sum(size for size, _ in found.values()) < minimum:
      return direct()
    stem = "-".join(
      [
        kind,
        "stored" if dtype is None else jnp.dtype(dtype).name,
        _digest(os.path.abspath(source), config, merge_lora, length=8),
      ]
    )
    entry = pathlib.Path(directory) / f"{stem}-{_version(kind, found)}"
    if cached := _read(entry, kind, dtype, sharding):
      return cached
    module, variables = direct()
    if _write(entry, kind, module, variables, source):
      for other in entry.parent.glob(f"{stem}-*"):
        if other != entry:
          shutil.rmtree(other, ignore_errors=True)
    return module, variables

  return load_cached


def _files(kind: str, source: sources.Source) -> dict[str, tuple[int, int]]:
  """Size and time of the files that a source may be read from, by name."""
  if isinstance(source, Mapping):
    return {}
  path = pathlib.Path(source)
  directory = path if path.is_dir() else path.parent
  patterns: tuple[str, ...] = ("*.json",)
  if not path.is_dir():
    patterns += (path.name,)
    if path.name.endswith(sources.INDEX_SUFFIX):
      patterns += ("*.safetensors",)
  elif any(any(path.glob(own)) for own in convert.KINDS[kind].files):
    patterns += tuple(convert.KINDS[kind].files)
  else:
    patterns = ("*",)
  stats = {
    file.name: file.stat()
    for pattern in patterns
    for file in directory.glob(pattern)
    if file.is_file()
  }
  return {
    name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()
  }


def _version(kind: str, found: Mapping[str, tuple[int, int]]) -> str:
  return _digest(
    sorted(found.items()),
    dcvideogen_jax.__version__,
    convert.KINDS[kind].layouts,
    length=16,
  )


def _digest(*parts: Any, length: int) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:length]


def _read(
  entry: pathlib.Path, kind: str, dtype: Any, sharding: Any
) -> tuple[Any, dict[str, Any]] | None:
  """What an entry holds; None if there is no entry or it is damaged."""
  if not (entry / "config.json").is_file():  # Written last.
    return None
  try:
    about = json.loads((entry / _ABOUT).read_text())
    module, variables = convert.load(kind, entry, None, dtype, sharding)
    param_dtype = jnp.dtype(about["param_dtype"])
    known = about["digests"]
  except (errors.UserError, OSError, ValueError, KeyError, TypeError) as e:
    logging.warning("%s is damaged (%s): it is made anew", entry, e)
    return None
  # Several processes would have to agree on what each has on its own disk.
  if all(x.is_fully_addressable for x in jax.tree.leaves(variables)):
    if digests.of_tree(variables["params"]) != known:
      logging.warning("%s holds other values than it was made with", entry)
      return None
  if module.param_dtype != param_dtype:  # Layers are counted differently here.
    module = module.clone(param_dtype=param_dtype)
  return module, variables


def _write(
  entry: pathlib.Path,
  kind: str,
  module: Any,
  variables: Mapping[str, Any],
  source: Any,
) -> bool:
  """Writes an entry, or nothing; says which."""
  leaves = tree.flatten(variables["params"])
  size = sum(leaf.nbytes for leaf in leaves.values())
  if not all(leaf.is_fully_addressable for leaf in leaves.values()):
    return False
  tensors = {
    name: sources.Tensor(
      leaf.shape, np.dtype(leaf.dtype), functools.partial(_to_host, leaf)
    )
    for name, leaf in leaves.items()
  }
  about = {
    "source": os.path.abspath(source),
    "param_dtype": jnp.dtype(module.param_dtype).name,
    "digests": digests.of_tree(variables["params"]),
  }
  try:
    files.make_directory(entry.parent)
    if shutil.disk_usage(entry.parent).free < _ROOM * size:
      return False
    files.make_directory(entry)
    with files.atomic(entry / _ABOUT) as path:
      path.write_text(json.dumps(about, indent=2) + "\n")
    config = {"kind": kind, **convert.config_of(module)}
    writing.write_directory(entry, "model", tensors, config)
  except (errors.UserError, OSError):  # It costs the next process some time.
    return False
  return True


def _to_host(leaf: jax.Array) -> np.ndarray:
  """Copies an array; a plain `np.asarray` would keep the copy in the array."""
  alike = jax.make_array_from_single_device_arrays(
    leaf.shape, leaf.sharding, [shard.data for shard in leaf.addressable_shards]
  )
  return np.asarray(alike)
