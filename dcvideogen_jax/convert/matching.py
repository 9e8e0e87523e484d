"""Finds which model weights belong to, and in which layout they are."""

import collections
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import differences, documents, errors, tree
from dcvideogen_jax.convert import (
  engine,
  kinds,
  naming,
  sources,
  wrappings,
)
from dcvideogen_jax.models import eight_bits
from dcvideogen_jax.models import fields as model_fields

Tensors = Mapping[str, sources.Tensor]

# The layout whose names and shapes are those of the JAX parameters.
OWN = "jax"


@functools.cache
def names(kind: str) -> wrappings.Known:
  """Returns all names that tensors of a kind may have."""
  about = kinds.KINDS[kind]
  return wrappings.known(about.layouts.values(), about.ignored, about.aliases)


def require_known(kind: str, where: str, tensors: Tensors) -> None:
  """Refuses tensors whose names are not those of the kind.

  Models with blocks and norms have some names in common. Tensors are refused if
  none of their names fits, or if another kind has more than twice as many.

  Args:
    kind: a key of `kinds.KINDS`.
    where: the source, for the message.
    tensors: tensors by their plain names.

  Raises:
    errors.UserError: says which kind the names belong to, if one is known.
  """
  if not tensors:
    raise errors.UserError(f"{where} holds no weights of {kind}")
  counts = {k: wrappings.count(tensors, names(k)) for k in kinds.KINDS}
  likely = max(counts, key=lambda k: counts[k])
  if counts[kind] and counts[likely] <= 2 * counts[kind]:
    return
  first = [errors.brief(name) for name in [*tensors][:3]]
  rules = kinds.KINDS[kind].layouts.values()
  expected = dict.fromkeys(table[0].torch for table in rules)
  raise errors.UserError(
    f"{where} does not hold a {kind}: expected names such as"
    f" {' or '.join(expected)}, found {len(tensors)} such as {', '.join(first)}"
    + (f": these are names of {likely}" if counts[likely] else "")
  )


def by_one_name(kind: str, where: str, tensors: Tensors) -> Tensors:
  """Renames tensors from the kind's aliases to the names of its layouts.

  Args:
    kind: a key of `kinds.KINDS`.
    where: the source, for the message.
    tensors: tensors by their plain names.

  Raises:
    errors.UserError: if an array is stored under both names and they differ.
  """
  found = dict(tensors)
  for alias, name in kinds.KINDS[kind].aliases.items():
    if alias not in found:
      continue
    other = found.pop(alias)
    if not engine.same(found.setdefault(name, other), other):
      raise errors.UserError(
        f"{where} holds two different arrays for what is one in {kind}:"
        f" {name} and {alias}"
      )
  return found


@functools.cache
def parameters(kind: str, module: nn.Module) -> Any:
  """Returns the parameter tree as `jax.ShapeDtypeStruct`s."""
  return kinds.KINDS[kind].init(module)["params"]


def nearest_layout(
  kind: str, tensors: Tensors, expected: Any
) -> tuple[str, Sequence[naming.Rule]]:
  """Finds the layout that has most of the names and, among several, fits best.

  The layout `OWN` of the JAX parameters is tried for every kind.

  Args:
    kind: a key of `kinds.KINDS`.
    tensors: tensors by their plain names.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.

  Returns:
    The name of the layout, and its rules.
  """
  own = [naming.Rule(name, name) for name in tree.names(expected)]
  layouts = {**kinds.KINDS[kind].layouts, OWN: own}
  found = _shapes(tensors)

  def distance(name):
    shapes = naming.torch_shapes(layouts[name], expected)
    unknown = naming.unknown(layouts[name], tree.shapes(expected))
    wrong = len(unknown) + differences.number_of(shapes, found)
    return -len(shapes.keys() & found.keys()), wrong

  name = min(layouts, key=distance)
  return name, layouts[name]


def _shapes(tensors: Tensors) -> dict[str, naming.Shape]:
  return {name: tensor.shape for name, tensor in tensors.items()}


def find_config(
  kind: str,
  source: sources.Source,
  config: str | Mapping[str, Any] | None,
  tensors: Tensors,
) -> Mapping[str, Any]:
  """Returns the fields that are given, stored beside the weights or recognised.

  Args:
    kind: a key of `kinds.KINDS`.
    source: the source of the weights, which may have a config.json beside it.
    config: as for `api.load`.
    tensors: the weights by their plain names.

  Raises:
    errors.UserError: for an unknown variant, a configuration that is damaged,
      quantised or of another model, or weights that need a configuration.
  """
  variants = kinds.KINDS[kind].variants
  if isinstance(config, str):
    if config not in variants:
      raise errors.UserError(
        f"unknown variant {config!r} of {kind}: expected one of {[*variants]}"
      )
    return variants[config]
  if config is not None:
    return _foreign(kind, config, "the configuration") or config
  if not isinstance(source, Mapping):
    path = pathlib.Path(source)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file() and (
      fields := _read_config(kind, beside, strict=path.is_dir())
    ):
      return fields
  return _infer(kind, tensors) or variants[_recognise(kind, source, tensors)]


def _read_config(
  kind: str, path: pathlib.Path, strict: bool
) -> Mapping[str, Any] | None:
  """Reads the fields in a config.json; returns None if it is another model's.

  Other libraries keep several models beside one config.json. This package's
  config.json describes a single model; if `strict`, another kind is an error.
  """
  try:
    fields = documents.parse(path.read_bytes())
    found = fields.pop("kind", None)
    how = fields.get("quantization_config")
  except (ValueError, TypeError, AttributeError, OSError) as e:
    raise errors.UserError(f"{path} is not a model's configuration: {e}") from e
  if how is not None:
    how = how.get("quant_method", how) if isinstance(how, dict) else how
    raise errors.UserError(
      f"{path} says that the weights are quantised by {model_fields.told(how)},"
      " which is not read here"
    )
  if found is None:
    return _foreign(kind, fields, path)
  if found == kind:
    return fields
  if strict:
    raise errors.UserError(f"{path} is of a {found}, expected {kind}")
  return None


def _foreign(
  kind: str, config: Mapping[str, Any], where: object
) -> Mapping[str, Any] | None:
  """Reads another library's configuration; None if it is not of this kind."""
  try:
    return kinds.KINDS[kind].config_from(config)
  except errors.UserError:
    raise
  except (ValueError, TypeError, AttributeError) as e:
    raise errors.UserError(f"{where} of {kind} cannot be read: {e}") from e


def _infer(kind: str, tensors: Tensors) -> Mapping[str, Any] | None:
  """Infers the fields from shapes, in the first layout that allows it."""
  for rules in kinds.KINDS[kind].layouts.values():
    if fields := kinds.KINDS[kind].infer(naming.jax_shapes(rules, tensors)):
      return fields
  return kinds.KINDS[kind].infer(_shapes(tensors))


def _recognise(kind: str, source: sources.Source, tensors: Tensors) -> str:
  """Returns the released variant with exactly these names and shapes."""
  found = _shapes(tensors)
  nearest = {}
  for name, fields in kinds.KINDS[kind].variants.items():
    expected = parameters(kind, kinds.KINDS[kind].build(fields))
    _, rules = nearest_layout(kind, tensors, expected)
    shapes = naming.torch_shapes(rules, expected)
    nearest[name] = (differences.number_of(shapes, found), shapes)
    if not nearest[name][0]:
      return name
  name = min(nearest, key=lambda name: nearest[name][0])
  count, shapes = nearest[name]
  raise errors.UserError(
    f"{sources.told(source)}: these weights are no released variant of {kind},"
    f" so a config is needed; the nearest, {name}, differs in {count} names,"
    " such as " + differences.tell(shapes, found, most=2)
  )


def stored_dtype(tensors: Tensors) -> np.dtype:
  """Returns the dtype that most tensors have in memory, as of `_kept`."""
  stored = collections.Counter(_kept(t) for t in tensors.values())
  (dtype, _), *_ = stored.most_common(1) or [(np.dtype(np.float32), 1)]
  return dtype


def _kept(tensor: sources.Tensor) -> np.dtype:
  """Returns the dtype in memory of a parameter that a tensor fills."""
  if tensor.stored is not None:
    return np.dtype(jnp.bfloat16)
  dtype = tensor.dtype
  if dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    return np.dtype(dtype)
  small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1
  return np.dtype(jnp.bfloat16 if small else np.float32)


def as_stored(
  rules: Sequence[naming.Rule], tensors: Tensors, expected: Any
) -> Any:
  """Returns `expected` with the dtypes in which the tensors are stored.

  Kernels that are expected in eight bits stay so.

  Args:
    rules: the rules of the tensors' layout.
    tensors: tensors by their plain names.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.
  """
  dtypes: dict[str, np.dtype] = {}
  for place in naming.places(rules, tree.shapes(expected)):
    if place.torch in tensors:
      dtype = _kept(tensors[place.torch])
      known = dtypes.get(place.jax, dtype)
      dtypes[place.jax] = np.dtype(jnp.promote_types(known, dtype))
  leaves = {
    name: leaf
    if eight_bits.is_stored(leaf.dtype)
    else jax.ShapeDtypeStruct(leaf.shape, dtypes.get(name, leaf.dtype))
    for name, leaf in tree.flatten(expected).items()
  }
  return flax.traverse_util.unflatten_dict(leaves, sep="/")
