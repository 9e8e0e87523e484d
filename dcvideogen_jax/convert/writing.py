"""Writes weights, tensor by tensor; a failure leaves no file behind."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dcvideogen_jax import errors, files
from dcvideogen_jax.convert import api, engine, kinds, sources, tensor_files

Tensors = Mapping[str, sources.Tensor]


def save(
  directory: str | os.PathLike[str],
  kind: str,
  module: Any,
  variables: api.Variables,
  dtype: DTypeLike | None = None,
  layout: str | None = None,
  shard_size: int | None = None,
) -> list[pathlib.Path]:
  """Writes a directory that `load` reads: config.json and safetensors.

  The weights have PyTorch names and layouts. Besides the parameters, host
  memory holds one tensor at a time. A failure leaves nothing behind.

  Args:
    directory: directory to write; it is made if it is missing.
    kind: a key of `api.KINDS`.
    module: the model.
    variables: `{"params": ...}`.
    dtype: dtype of the stored weights; None keeps that of the parameters.
    layout: name of one of the kind's layouts, for the library of that name,
      whose config.json and file names are used; None writes the config.json of
      this package and the kind's first layout.
    shard_size: bytes of tensors that a file may hold; more are spread over
      several files with an index. None writes one file.

  Returns:
    The paths of the files, the weights first.

  Raises:
    errors.UserError: if a file cannot be written, the directory already holds
      other weights, the layout is unknown, or a weight is not finite. Also for
      weights in eight bits with a `dtype` or `layout`: only this package reads
      them, as they are.
  """
  if layout is not None or dtype is not None:
    _require_no_eight_bits(module, layout or np.dtype(dtype).name)
  tensors = api.to_tensors(kind, module, variables, layout)
  config: Mapping[str, Any] | None = {"kind": kind, **api.config_of(module)}
  stem = "model"
  if layout is not None:
    stem = kinds.KINDS[kind].stem
    to_config = kinds.KINDS[kind].configs.get(layout)
    config = to_config and to_config(api.config_of(module))
  if dtype is not None:
    tensors = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
  return write_directory(directory, stem, tensors, config, shard_size)


def write_directory(
  directory: str | os.PathLike[str],
  stem: str,
  tensors: Tensors,
  config: Mapping[str, Any] | None,
  shard_size: int | None = None,
  config_name: str = "config.json",
  metadata: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
  """Writes tensors as `stem`.safetensors, or as several files with an index.

  Args:
    directory: directory to write; it is made if it is missing.
    stem: start of the weights' file names.
    tensors: tensors by name.
    config: contents of config.json; None writes no such file.
    shard_size: bytes of tensors that a file may hold; None writes one file.
    config_name: name of the file of `config`.
    metadata: texts for the header of the files of weights.

  Returns:
    The paths of the files, the weights first.

  Raises:
    errors.UserError: if a file cannot be written, the directory already holds
      other weights, or a tensor is not finite.
  """
  groups = _groups(tensors, shard_size)
  names = [f"{stem}.safetensors"]
  if (count := len(groups)) > 1:
    names = [
      f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
  directory = files.make_directory(directory)
  documents: dict[str, Mapping[str, Any]] = {}
  if len(groups) > 1:
    documents[f"{stem}.safetensors{sources.INDEX_SUFFIX}"] = {
      "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
      "weight_map": {
        name: file
        for file, group in zip(names, groups, strict=True)
        for name in group
      },
    }
  if config is not None:
    documents[config_name] = config
  _require_no_others(directory, {*names, *documents})
  with contextlib.ExitStack() as stack:
    # The file that is entered first is renamed last, so that an index or a
    # config.json is in place only after its weights.
    for name, document in documents.items():
      path = stack.enter_context(files.atomic(directory / name))
      path.write_text(json.dumps(document, indent=2) + "\n")
    for name, group in zip(names, groups, strict=True):
      path = stack.enter_context(files.atomic(directory / name))
      write_safetensors(path, group, metadata)
  return [directory / name for name in [*names, *documents]]


def finite(name: str, tensor: sources.Tensor) -> np.ndarray:
  """Reads a tensor that is to be written.

  Raises:
    errors.UserError: if a value is not finite, since `load` would refuse it.
  """
  array = tensor.read()
  if not engine.finite(array):
    raise errors.UserError(
      f"{name} holds NaN, infinity or what {tensor.dtype.name} cannot hold, so"
      " nothing is written"
    )
  return array


def write_safetensors(
  path: pathlib.Path,
  tensors: Tensors,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one `.safetensors` file.

  Args:
    path: the file.
    tensors: tensors by name.
    metadata: texts for the header.

  Raises:
    OSError: if the file cannot be written.
    errors.UserError: for weights that are not finite.
  """
  # Wide elements come first, so that all are aligned, as in the safetensors
  # library.
  ordered = sorted(
    tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
  )
  header: dict[str, Any] = {
    "__metadata__": {"format": "pt", **(metadata or {})}
  }
  offset = 0
  for name, tensor in ordered:
    end = offset + _bytes(tensor)
    header[name] = {
      "dtype": tensor_files.NAMES[tensor.dtype],
      "shape": [*tensor.shape],
      "data_offsets": [offset, end],
    }
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in ordered:
      array = np.ascontiguousarray(finite(name, tensor))
      file.write(array.view(np.uint8).data)


def write_file(
  path: str | os.PathLike[str],
  kind: str,
  module: Any,
  variables: dict[str, Any],
  layout: str | None = None,
) -> None:
  """Writes all weights as one .safetensors file or, by PyTorch, one .pt file.

  Args:
    path: the file; the suffix .safetensors selects that format, any other .pt.
    kind: a key of `api.KINDS`.
    module: the model.
    variables: `{"params": ...}`.
    layout: name of one of the kind's layouts; None is the first and gives a .pt
      the keys that DC-VideoGen's own loader reads.

  Raises:
    errors.UserError: for weights that are not finite or in eight bits, if the
      file cannot be written, or if a .pt is asked for and torch is not
      installed.
  """
  _require_no_eight_bits(module, f"the file {path}")
  with files.atomic(path) as new:
    tensors = api.to_tensors(kind, module, variables, layout)
    if pathlib.Path(path).suffix == ".safetensors":
      write_safetensors(new, tensors)
    else:
      _save_pt(new, tensors, flat=layout is not None)


def _require_no_eight_bits(module: Any, target: str) -> None:
  if getattr(module, "weights", None):
    raise errors.UserError(
      f"weights in {module.weights} are only written as a directory for the"
      f" programs here: expected --to=jax, found {target}"
    )


def _save_pt(
  path: pathlib.Path, tensors: Mapping[str, sources.Tensor], flat: bool
) -> None:
  """Writes tensors by name or, for DC-VideoGen's loader, under both its keys.

  Under both keys the data is stored once.

  Raises:
    errors.UserError: if torch is not installed.
  """
  try:
    import torch
  except ImportError as e:
    raise errors.UserError(
      "writing a .pt needs PyTorch, which is not installed: run"
      " `pip install torch`, or give --output a name in .safetensors"
    ) from e
  found = {n: _to_torch(torch, finite(n, x)) for n, x in tensors.items()}
  both = {"model_state_dict": found, "ema_model_state_dict": {"ema": found}}
  try:
    with path.open("wb") as file:
      torch.save(found if flat else both, file)
  except RuntimeError as e:  # torch hides the disk's error behind its own.
    raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def _to_torch(torch: Any, x: np.ndarray) -> Any:
  x = x if x.flags.writeable else x.copy()  # torch warns of read-only arrays.
  if x.dtype == jnp.bfloat16:  # torch does not know numpy's bfloat16.
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(x)


def _bytes(tensor: sources.Tensor) -> int:
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def cast(tensor: sources.Tensor, dtype: DTypeLike) -> sources.Tensor:
  """Returns a tensor that is cast to another dtype when it is read."""
  dtype = np.dtype(dtype)

  def read() -> np.ndarray:
    with np.errstate(over="ignore"):  # Writing refuses infinite values.
      return tensor.read().astype(dtype, copy=False)

  return sources.Tensor(tensor.shape, dtype, read)


def _groups(
  tensors: Tensors, shard_size: int | None
) -> list[dict[str, sources.Tensor]]:
  """Splits tensors, in order, into files of at most `shard_size` bytes."""
  groups: list[dict[str, sources.Tensor]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if shard_size and groups[-1] and size + _bytes(tensor) > shard_size:
      groups.append({})
      size = 0
    groups[-1][name] = tensor
    size += _bytes(tensor)
  return groups


def _require_no_others(directory: pathlib.Path, names: Set[str]) -> None:
  """Refuses a directory that holds other weights.

  They would be read instead of the new weights, or together with them.
  """
  others = [
    path.name
    for path in sorted(directory.glob("[!.]*"))
    if path.name.endswith((".safetensors", sources.INDEX_SUFFIX))
    and path.name not in names
  ]
  if others:
    raise errors.UserError(
      f"{directory} holds other weights already, {others[0]}: "
      "expected a directory without, or with the same model in as many files"
    )
