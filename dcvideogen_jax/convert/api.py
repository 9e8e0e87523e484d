"""Loads, recognises and saves models, whatever layout their weights have."""

import collections
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dcvideogen_jax import errors, files, tree
from dcvideogen_jax.convert import dc_ae_v as dc_ae_v_rules
from dcvideogen_jax.convert import engine, sources
from dcvideogen_jax.models import dc_ae_v

Variables = dict[str, Any]


class Kind(NamedTuple):
  """What the loader needs to know of a model.

  Attributes:
    rules: names on both sides.
    variants: released configurations by name.
    build: configuration -> module.
    example: module -> shapes of the arguments of `__call__`.
  """

  rules: list[engine.Rule]
  variants: Mapping[str, Mapping[str, Any]]
  build: Callable[..., nn.Module]
  example: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]


def _video(module: dc_ae_v.DCAEV) -> tuple[jax.ShapeDtypeStruct, ...]:
  size = module.spatial_factor
  shape = (1, module.frames_multiple, size, size, 3)
  return (jax.ShapeDtypeStruct(shape, jnp.float32),)


KINDS = {
  "dc_ae_v": Kind(dc_ae_v_rules.RULES, dc_ae_v.VARIANTS, dc_ae_v.build, _video),
}


def load(
  kind: str,
  source: sources.Source,
  config: str | Mapping[str, Any] | None = None,
  dtype: jnp.dtype | None = None,
) -> tuple[Any, Variables]:
  """Loads a model from PyTorch or converted weights.

  Tensors are read one at a time, so host memory peaks near one copy of the
  weights.

  Args:
    kind: a key of `KINDS`.
    source: `.pt`, `.pth`, `.safetensors`, a directory (its config.json is
      used if it was written by `save`), or a mapping from names to arrays.
    config: name of a released variant or the model's own fields; None reads
      config.json or recognises a released variant from the weights.
    dtype: of the parameters and of the computation; None keeps the parameters
      as they are and computes in float32.

  Returns:
    The module and its variables, `{"params": ...}`.

  Raises:
    errors.UserError: if the source is missing, damaged, not finite, not safe
      to read or does not fit the configuration; every difference is listed.
  """
  if kind not in KINDS:
    raise errors.UserError(f"unknown kind {kind!r}: expected {[*KINDS]}")
  tensors = sources.open_source(source)
  fields = _find_config(kind, source, config, tensors)
  param_dtype = dtype or _stored_dtype(tensors)
  try:
    module = KINDS[kind].build(
      fields, dtype=dtype or jnp.float32, param_dtype=param_dtype
    )
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"the configuration of {kind}: {e}") from e
  expected = _expected(kind, module)
  what = kind if isinstance(source, Mapping) else str(source)
  params = engine.torch_to_jax(KINDS[kind].rules, tensors, expected, what)
  return module, {"params": params}


def to_torch(
  kind: str, module: nn.Module, variables: Variables
) -> dict[str, np.ndarray]:
  """The official PyTorch state dict, bit for bit, as numpy arrays.

  Raises:
    errors.UserError: if the variables are not those of the module.
  """
  params = variables["params"]
  tree.require_equal(
    tree.shapes(_expected(kind, module)),
    tree.shapes(params),
    f"the parameters of {kind}",
  )
  return engine.jax_to_torch(KINDS[kind].rules, params)


def save(
  directory: str | os.PathLike[str],
  kind: str,
  module: Any,
  variables: Variables,
  dtype: jnp.dtype | None = None,
) -> None:
  """Writes a directory that `load` reads: config.json and model.safetensors.

  The weights have the official PyTorch names and layout.

  Args:
    directory: is made if it is missing.
    kind: a key of `KINDS`.
    module: the model.
    variables: `{"params": ...}`.
    dtype: of the stored weights; None keeps them as they are.

  Raises:
    errors.UserError: if something cannot be written.
  """
  state_dict = to_torch(kind, module, variables)
  if dtype is not None:
    state_dict = {name: x.astype(dtype) for name, x in state_dict.items()}
  directory = files.make_directory(directory)
  with files.atomic(directory / "model.safetensors") as path:
    try:
      safetensors.numpy.save_file(state_dict, path, {"format": "pt"})
    except safetensors.SafetensorError as e:  # Such as a full disk.
      raise errors.UserError(
        f"cannot write {directory / 'model.safetensors'}: {e}"
      ) from e
  with files.atomic(directory / "config.json") as path:
    config = {"kind": kind, **config_of(module)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def config_of(module: Any) -> dict[str, Any]:
  """The fields that make the architecture, without those of one run."""
  run = {"parent", "name", "dtype", "param_dtype", "remat", "conv3d"}
  return {
    name: getattr(module, name)
    for name in type(module).__dataclass_fields__
    if name not in run
  }


def _stored_dtype(tensors: Mapping[str, sources.Tensor]) -> np.dtype:
  """The dtype of most tensors; whole numbers and float64 become float32."""
  stored = collections.Counter(t.dtype for t in tensors.values())
  (dtype, _), *_ = stored.most_common(1) or [(jnp.float32, 1)]
  narrow = jnp.issubdtype(dtype, jnp.floating) and dtype != np.float64
  return dtype if narrow else np.dtype(np.float32)


@functools.cache
def _expected(kind: str, module: nn.Module) -> Any:
  """The parameter tree as shapes and dtypes."""
  example = KINDS[kind].example(module)
  variables = jax.eval_shape(module.init, jax.random.key(0), *example)
  return variables["params"]


def _find_config(
  kind: str,
  source: sources.Source,
  config: str | Mapping[str, Any] | None,
  tensors: Mapping[str, sources.Tensor],
) -> Mapping[str, Any]:
  """The fields that were given, stored beside the weights, or recognised."""
  variants = KINDS[kind].variants
  if isinstance(config, str):
    if config not in variants:
      raise errors.UserError(
        f"unknown variant {config!r} of {kind}: expected one of {[*variants]}"
      )
    return variants[config]
  if config is not None:
    return config
  if not isinstance(source, Mapping):
    path = pathlib.Path(source) / "config.json"
    if path.is_file():
      return _read_config(kind, path)
  return variants[_recognise(kind, tensors)]


def _read_config(kind: str, path: pathlib.Path) -> Mapping[str, Any]:
  try:
    fields = json.loads(path.read_text())
    found = fields.pop("kind")
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
    raise errors.UserError(f"{path} is not a model's configuration: {e}") from e
  if found != kind:
    raise errors.UserError(f"{path} is of a {found}, expected {kind}")
  return fields


def _recognise(kind: str, tensors: Mapping[str, sources.Tensor]) -> str:
  """The released variant whose names and shapes these are."""
  found = engine.jax_shapes(KINDS[kind].rules, tensors)
  differences = {}
  for name, fields in KINDS[kind].variants.items():
    shapes = tree.shapes(_expected(kind, KINDS[kind].build(fields)))
    differences[name] = tree.diff(shapes, found)
    if not differences[name]:
      return name
  nearest = min(differences, key=lambda name: len(differences[name]))
  lines = differences[nearest]
  raise errors.UserError(
    f"these weights are no released variant of {kind}, so a config is needed; "
    f"the nearest, {nearest}, differs in {len(lines)} names, such as "
    + "; ".join(lines[:3])
  )
