"""Loads, recognises and converts models, whatever layout their weights have."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import (
  engine,
  kinds,
  lora,
  lora_config,
  lora_names,
  matching,
  naming,
  quantised,
  sources,
  wrappings,
)

KINDS = kinds.KINDS
Variables = dict[str, Any]
Tensors = Mapping[str, sources.Tensor]


def load(
  kind: str,
  source: sources.Source,
  config: str | Mapping[str, Any] | None = None,
  dtype: jnp.dtype | None = None,
  sharding: Any = None,
  merge_lora: bool = True,
) -> tuple[Any, Variables]:
  """Loads a model from PyTorch or converted weights.

  Every layout of the kind and our own names are tried; the one that fits
  counts. Parameters are made one at a time, straight on their devices.

  Args:
    kind: a key of `KINDS`.
    source: what `sources.open_source` reads: `.safetensors`, `.pt`, `.pth`, an
      index, a directory, or a mapping from names to arrays.
    config: name of a released variant, the model's own fields, or the contents
      of another library's config.json; None reads the config.json beside the
      weights or, without one, recognises a released variant or infers the
      fields from the shapes (the heads of Wan's transformer are then assumed
      to have 128 channels, as in all released ones).
    dtype: of the parameters, but those that the model keeps in float32, and of
      the computation; None keeps every parameter as it is stored (float64
      becomes float32, float8 becomes bfloat16), computes in float32.
    sharding: a `jax.sharding.Sharding` for all parameters, a tree of them like
      `{"params": ...}`, or a function from the abstract tree to that tree, such
      as `functools.partial(sharding.shardings, mesh=mesh, rules=rules)`.
    merge_lora: whether low-rank updates that lie beside their base weights, in
      a trainer's file, are added to them; otherwise they are left out (see
      `load_lora`).

  Returns:
    The module and its variables, `{"params": ...}`.

  Raises:
    errors.UserError: if the source is missing, damaged, quantised, not finite,
      not safe to read or does not fit the configuration; every difference is
      listed.
  """
  tensors = _open(kind, source)
  weights, updates = _split(kind, source, tensors)
  if updates and not weights:
    raise errors.UserError(
      f"{sources.told(source)} holds low-rank updates only, no weights of"
      f" {kind}"
    )
  matching.require_known(kind, sources.told(source), weights)
  module = _build(kind, source, config, weights, dtype)
  expected = matching.parameters(kind, module)
  what, rules = _layout(kind, source, weights, expected)
  if dtype is None:
    expected = matching.as_stored(rules, weights, expected)
  shardings = _shardings(sharding, expected)
  params = engine.torch_to_jax(rules, weights, expected, what, shardings)
  if updates and merge_lora:
    found = _read_lora(kind, source, tensors, expected)
    params = lora.merge(params, found, donate=True)
  return module, {"params": params}


def load_part(
  kind: str, source: sources.Source, module: nn.Module
) -> dict[str, Any]:
  """Loads the parameters that a file holds, for a model that has more.

  For the file of DC-VideoGen's first phase, say, which holds the patch
  embedding, or for the modules that lie as a whole beside low-rank updates.

  Args:
    kind: a key of `KINDS`.
    source: as for `load`.
    module: the model that the parameters are for.

  Returns:
    The part of the parameter tree that the source holds, with the dtypes of
    the source.

  Raises:
    errors.UserError: as `load`, also if nothing or only some layers of a
      parameter are there.
  """
  weights, _ = _split(kind, source, _open(kind, source))
  expected = matching.parameters(kind, module)
  return _read_part(kind, source, weights, expected)


def _read_part(
  kind: str, source: sources.Source, weights: Tensors, expected: Any
) -> dict[str, Any]:
  """The parameters that tensors by their plain names hold."""
  what, rules = _layout(kind, source, weights, expected)
  named = {
    place.jax
    for place in naming.places(rules, tree.shapes(expected))
    if place.torch in weights
  }
  if not named:
    raise errors.UserError(f"{what} holds no parameter of the model")
  part = flax.traverse_util.unflatten_dict(
    {n: leaf for n, leaf in tree.flatten(expected).items() if n in named},
    sep="/",
  )
  part = matching.as_stored(rules, weights, part)
  return engine.torch_to_jax(rules, weights, part, what)


def load_lora(
  kind: str,
  source: sources.Source,
  module: nn.Module,
  scale: float = 1.0,
) -> lora.Lora:
  """Loads low-rank updates, in any spelling that `lora_names` knows.

  Where tensors do not say alpha, PEFT's adapter_config.json and the metadata
  that diffusers writes do (see `lora_config`); in a trainer's file, where
  updates lie beside their weights, `lora.trainer_scaling` holds. Elsewhere it
  is the rank, with a warning. What PEFT has trained as a whole
  (`modules_to_save`, biases) is part of the result.

  Args:
    kind: a key of `KINDS`.
    source: as for `load`; a trainer's weights that lie there too are left out.
    module: the model that the updates are for.
    scale: multiplies the updates.

  Raises:
    errors.UserError: if the source is damaged, holds no update, or holds names
      or shapes that are not the model's; all are listed. Also if it holds
      adapters that are no plain LoRA, or of an altered base; for a scale that
      is not finite, or is not 1 where modules are replaced, which cannot be
      done by half.
  """
  if not math.isfinite(scale):
    raise errors.UserError(
      f"{sources.told(source)}: expected a finite scale, found {scale}"
    )
  expected = matching.parameters(kind, module)
  return _read_lora(kind, source, _open(kind, source), expected, scale)


def with_lora(
  kind: str, module: nn.Module, updates: lora.Lora
) -> tuple[Any, Variables]:
  """A model that computes updates apart from its weights.

  Returns:
    The module with `lora_rank`, and `{"lora": ...}` for its variables.

  Raises:
    errors.UserError: if a layer that is updated cannot do that.
  """
  module = module.clone(lora_rank=updates.rank, lora_alpha=float(updates.rank))
  example = KINDS[kind].example(module)
  variables = jax.eval_shape(module.init, jax.random.key(0), *example)
  return module, {"lora": lora.collection(updates, variables["lora"])}


def to_torch(
  kind: str,
  module: nn.Module,
  variables: Variables,
  layout: str | None = None,
) -> dict[str, np.ndarray]:
  """The PyTorch state dict, bit for bit, as numpy arrays.

  Args:
    kind: a key of `KINDS`.
    module: the model.
    variables: `{"params": ...}`.
    layout: one of the kind's; None is the first.

  Raises:
    errors.UserError: if the variables are not those of the module, or the
      layout is unknown.
  """
  tensors = to_tensors(kind, module, variables, layout)
  return {name: tensor.read() for name, tensor in tensors.items()}


def to_tensors(
  kind: str,
  module: nn.Module,
  variables: Variables,
  layout: str | None = None,
) -> dict[str, sources.Tensor]:
  """`to_torch`, made tensor by tensor when it is read."""
  rules = rules_of(kind, layout)
  params = variables["params"]
  differences.require_equal(
    tree.shapes(matching.parameters(kind, module)),
    tree.shapes(params),
    f"the parameters of {kind}",
  )
  return engine.torch_tensors(rules, params)


def rules_of(kind: str, layout: str | None) -> Sequence[naming.Rule]:
  """The table of a layout; None is the kind's first.

  Raises:
    errors.UserError: if the kind has no such layout.
  """
  layouts = KINDS[kind].layouts
  if layout is not None and layout not in layouts:
    raise errors.UserError(
      f"unknown layout {layout!r} of {kind}: expected one of {[*layouts]}"
    )
  return layouts[layout or next(iter(layouts))]


def config_of(module: Any) -> dict[str, Any]:
  """The fields that make the architecture, without those of one run."""
  run = {"parent", "name", "dtype", "param_dtype", "remat", "conv3d"}
  run |= {"attention", "lora_rank", "lora_alpha"}
  return {
    name: getattr(module, name)
    for name in type(module).__dataclass_fields__
    if name not in run
  }


def _open(kind: str, source: sources.Source) -> Tensors:
  if kind not in KINDS:
    raise errors.UserError(f"unknown kind {kind!r}: expected {[*KINDS]}")
  tensors = sources.open_source(source, KINDS[kind].files)
  quantised.require_plain(sources.told(source), tensors)
  tensors = wrappings.without_inner(sources.told(source), tensors)
  lora_names.require_low_rank(tensors, sources.told(source))
  return tensors


def _split(
  kind: str, source: sources.Source, tensors: Tensors
) -> tuple[Tensors, Tensors]:
  """Weights, by their plain names, and low-rank updates."""
  where, names = sources.told(source), matching.names(kind)
  weights, updates = lora_names.split(tensors)
  weights = wrappings.unwrap(where, kind, weights, names)
  weights = wrappings.without_passengers(where, weights, names)
  weights = matching.by_one_name(kind, where, weights)
  weights = {
    name: tensor
    for name, tensor in weights.items()
    if not any(expression.fullmatch(name) for expression in names.ignored)
  }
  return weights, updates


def _read_lora(
  kind: str,
  source: sources.Source,
  tensors: Tensors,
  expected: Any,
  scale: float = 1.0,
) -> lora.Lora:
  """Updates with the alpha that belongs to them."""
  weights: Tensors = {}
  description = lora_config.find(source)
  with_base = any(name.endswith(".base_layer.weight") for name in tensors)
  if description:
    scaling: lora.Scaling = description.factor
  elif with_base:
    scaling = lora.trainer_scaling
  else:
    scaling = lora.unknown_scaling(sources.told(source))
  if with_base:
    _, tensors = lora_names.split(tensors)
  # Others are not passed over: they are no updates of the model.
  elif description and description.whole:
    weights, tensors = _split(kind, source, tensors)
  layouts = KINDS[kind].layouts
  found = lora.read(
    tensors, layouts, expected, sources.told(source), scaling, scale
  )
  if not weights:
    return found
  if scale != 1:
    raise errors.UserError(
      f"{sources.told(source)} replaces {len(weights)} weights, which cannot be"
      f" scaled: expected a scale of 1, found {scale:g}"
    )
  part = tree.flatten(_read_part(kind, source, weights, expected))
  whole = {name: np.asarray(x, np.float32) for name, x in part.items()}
  return found._replace(whole=whole, matched=found.matched + len(weights))


def _layout(
  kind: str, source: sources.Source, weights: Tensors, expected: Any
) -> tuple[str, Sequence[naming.Rule]]:
  """What is loaded and how it was understood, for messages, and its table.

  Raises:
    errors.UserError: for quantised weights.
  """
  layout, rules = matching.nearest_layout(kind, weights, expected)
  names = naming.torch_shapes(rules, expected)
  quantised.require_floats(sources.told(source), weights, names)
  where = "" if isinstance(source, Mapping) else f"{source}: "
  return f"{where}{kind} in {layout} names", rules


def _build(kind, source, config, weights: Tensors, dtype) -> nn.Module:
  fields = matching.find_config(kind, source, config, weights)
  try:
    return KINDS[kind].build(
      fields,
      dtype=dtype or jnp.float32,
      param_dtype=dtype or matching.stored_dtype(weights),
    )
  except (TypeError, ValueError) as e:
    where = "" if isinstance(source, Mapping) else f"{source}: "
    raise errors.UserError(f"{where}the configuration of {kind}: {e}") from e


def _shardings(sharding: Any, expected: Any) -> Callable[..., Any]:
  """Name and shape of a parameter -> its sharding."""
  if callable(sharding):
    sharding = sharding({"params": expected})
  if sharding is None or isinstance(sharding, jax.sharding.Sharding):
    return lambda name, shape: sharding
  by_name = tree.flatten(sharding["params"])
  if missing := sorted(tree.flatten(expected).keys() - by_name.keys()):
    raise errors.UserError(f"no sharding is given for {', '.join(missing)}")
  return lambda name, shape: by_name[name]
