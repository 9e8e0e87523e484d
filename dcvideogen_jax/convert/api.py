"""Loads, recognises and converts models in every layout of their weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dcvideogen_jax import errors, tree
from dcvideogen_jax.convert import (
  engine,
  kinds,
  lora,
  lora_config,
  lora_names,
  lora_reading,
  matching,
  naming,
  quantised,
  quantised_layers,
  rounding,
  sources,
  state_dicts,
  wrappings,
)
from dcvideogen_jax.models import eight_bits

KINDS = kinds.KINDS
config_of = state_dicts.config_of
rules_of = state_dicts.rules_of
to_tensors = state_dicts.to_tensors
to_torch = state_dicts.to_torch
Variables = state_dicts.Variables
Tensors = Mapping[str, sources.Tensor]


def load(
  kind: str,
  source: sources.Source,
  config: str | Mapping[str, Any] | None = None,
  dtype: DTypeLike | None = None,
  sharding: Any = None,
  merge_lora: bool = True,
  weights: str | None = None,
  only: Callable[[str], bool] | None = None,
) -> tuple[Any, Variables]:
  """Loads a model from PyTorch or converted weights.

  Every layout of the kind is tried, and the names of the JAX parameters; the
  one that fits best is used. Parameters are made one at a time, directly on
  their devices.

  Args:
    kind: a key of `KINDS`.
    source: what `sources.open_source` reads: `.safetensors`, `.pt`, `.pth`, an
      index, a directory, or a mapping from names to arrays.
    config: name of a released variant, the model's own fields, or the contents
      of another library's config.json; None reads the config.json beside the
      weights or, without one, recognises a released variant or infers the
      fields from the shapes (the heads of Wan's transformer are then assumed
      to have 128 channels, as in all released ones).
    dtype: dtype of the computation and of the parameters, except those that the
      model keeps in float32; None computes in float32 and keeps the stored
      dtype of every parameter (float64 becomes float32, float8 and quantised
      weights bfloat16).
    sharding: a `jax.sharding.Sharding` for all parameters, a tree of them like
      `{"params": ...}`, or a function from the abstract tree to that tree, such
      as `functools.partial(sharding.shardings, mesh=mesh, rules=rules)`.
    merge_lora: whether low-rank updates that a trainer's file holds beside
      their base weights are added to them; otherwise they are left out (see
      `load_lora`).
    weights: "int8" or "float8" for kernels of blocks in eight bits (see
      `models.eight_bits`), which are rounded as they are read; "bfloat16" for
      kernels like the other parameters; None for what the source holds.
    only: JAX name of a parameter -> whether it is read; None reads all. The
      others are checked, and missing from the variables.

  Returns:
    The module and its variables, `{"params": ...}`.

  Raises:
    errors.UserError: if the source is missing, damaged, quantised in a format
      that is not read, not finite or not safe to read, or if it does not fit
      the configuration; every difference is listed.
  """
  stored = rounding.beside(source)
  tensors = _open(kind, source, plain=stored is None)
  found, updates = _split(kind, source, tensors)
  if updates and not found:
    raise errors.UserError(
      f"{sources.told(source)} holds low-rank updates only, no weights of"
      f" {kind}"
    )
  matching.require_known(kind, sources.told(source), found)
  chosen = rounding.choose(kind, source, weights, stored)
  fields = matching.find_config(kind, source, config, found)
  module = _build(kind, source, fields, found, dtype, chosen)
  expected = matching.parameters(kind, module)
  what, rules = _layout(kind, source, found, expected)
  if dtype is None:
    expected = matching.as_stored(rules, found, expected)
  if updates and merge_lora and chosen and not stored:
    # Updates are added before the kernels are rounded.
    module, variables = load(kind, source, config, dtype, rounding.host())
    return rounding.in_eight_bits(kind, module, variables, chosen, sharding)
  shardings = state_dicts.shardings(sharding, expected)
  params = engine.torch_to_jax(rules, found, expected, what, shardings, only)
  if updates and merge_lora:
    merged = _read_lora(kind, source, tensors, expected)
    params = lora.merge(params, merged, donate=True)
  return module, {"params": params}


def load_part(
  kind: str, source: sources.Source, module: nn.Module
) -> dict[str, Any]:
  """Loads some of a model's parameters: those that a file holds.

  Such a file is that of DC-VideoGen's first phase, which holds the patch
  embedding, or one with whole modules beside low-rank updates.

  Args:
    kind: a key of `KINDS`.
    source: as for `load`.
    module: the model that the parameters are for.

  Returns:
    The part of the parameter tree that the source holds, with the dtypes of
    the source.

  Raises:
    errors.UserError: as `load` does, and also if the source holds no parameter
      of the model, or only some layers of one.
  """
  weights, _ = _split(kind, source, _open(kind, source))
  expected = matching.parameters(kind, module)
  return _read_part(kind, source, weights, expected)


def _read_part(
  kind: str, source: sources.Source, weights: Tensors, expected: Any
) -> dict[str, Any]:
  """Converts the parameters that tensors, by their plain names, hold."""
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
  skip: str | Sequence[str] = (),
) -> lora.Lora:
  """Loads LoRA or other adapters, in any spelling that `lora_names` knows.

  If no tensor holds alpha, it is read from PEFT's adapter_config.json or from
  the metadata that diffusers writes (see `lora_config`). In a trainer's file,
  which holds updates beside their base weights,
  `lora_reading.trainer_scaling` applies. Elsewhere alpha is taken to be the
  rank, with a warning. Modules and biases that PEFT trained as a whole
  (`modules_to_save`) are part of the result.

  Args:
    kind: a key of `KINDS`.
    source: as for `load`; base weights that a trainer stored there are left
      out.
    module: the model that the updates are for.
    scale: factor of the updates; what they change is scaled, also where the
      change depends on the weights.
    skip: regular expressions; tensors whose names contain one are left out and
      counted. "interface" leaves out those of the patch embedding and of the
      head, so that LoRA of Wan's base fits an adapted model.

  Raises:
    errors.UserError: if the source is damaged, holds no update, or holds names
      or shapes that are not the model's; all are listed. Also if it holds
      adapters of other kinds than `lora_forms` has, or updates of a base that
      cannot be rebuilt; if the scale is not finite; if it is not 1 and the
      source replaces whole modules, which cannot be scaled; or if `skip` is no
      regular expression or leaves nothing.
  """
  if not math.isfinite(scale):
    raise errors.UserError(
      f"{sources.told(source)}: expected a finite scale, found {scale}"
    )
  skip = (skip,) if isinstance(skip, str) else skip
  expected = matching.parameters(kind, module)
  return _read_lora(kind, source, _open(kind, source), expected, scale, skip)


def with_lora(
  kind: str, module: nn.Module, updates: lora.Lora
) -> tuple[Any, Variables]:
  """Makes a model that computes low-rank updates apart from its weights.

  Args:
    kind: a key of `KINDS`.
    module: the model without updates.
    updates: from `load_lora` or `lora.add`.

  Returns:
    The module with `lora_rank`, and `{"lora": ...}` for its variables.

  Raises:
    errors.UserError: if an update belongs to a layer that cannot compute it
      apart.
  """
  module = module.clone(lora_rank=updates.rank, lora_alpha=float(updates.rank))
  variables = KINDS[kind].init(module)
  return module, {"lora": lora.collection(updates, variables["lora"])}


def _open(kind: str, source: sources.Source, plain: bool = True) -> Tensors:
  if kind not in KINDS:
    raise errors.UserError(f"unknown kind {kind!r}: expected {[*KINDS]}")
  tensors = sources.open_source(source, KINDS[kind].files)
  if plain:
    tensors = quantised_layers.join(sources.told(source), tensors)
    quantised.require_plain(sources.told(source), tensors)
  tensors = wrappings.without_inner(sources.told(source), tensors)
  lora_names.require_known(tensors, sources.told(source))
  return tensors


def _split(
  kind: str, source: sources.Source, tensors: Tensors
) -> tuple[Tensors, Tensors]:
  """Splits tensors into weights, by their plain names, and low-rank updates."""
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
  skip: Sequence[str] = (),
) -> lora.Lora:
  """Reads updates with their alpha, and the modules trained as a whole."""
  weights: Tensors = {}
  description = lora_config.find(source)
  with_base = any(name.endswith(".base_layer.weight") for name in tensors)
  if description:
    scaling: lora_reading.Scaling = description.factor
  elif with_base:
    scaling = lora_reading.trainer_scaling
  else:
    scaling = lora_reading.unknown_scaling(sources.told(source))
  if with_base:
    _, tensors = lora_names.split(tensors)
  count, what = len(tensors), sources.told(source)
  tensors = lora_names.without(tensors, skip, what)
  skipped = count - len(tensors)
  if skipped and not tensors:
    raise errors.UserError(f"{what}: skip leaves none of its {count} tensors")
  # In any other file, tensors that are not updates are reported as an error.
  if not with_base and description and description.whole:
    weights, tensors = _split(kind, source, tensors)
  layouts = KINDS[kind].layouts
  found = lora_reading.read(
    tensors, layouts, expected, what, scaling, scale, description
  )._replace(skipped=skipped)
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
  """Finds the layout of weights.

  Returns:
    What is loaded and in which layout, for messages; and the layout's rules.

  Raises:
    errors.UserError: for weights whose dtype is not a plain floating-point one.
  """
  layout, rules = matching.nearest_layout(kind, weights, expected)
  leaves = tree.flatten(expected)
  plain = engine.rounded(rules, weights, leaves).keys() | {
    name
    for name, leaf in leaves.items()
    if not eight_bits.is_stored(leaf.dtype)
  }
  floats = [
    slot.torch
    for slot in naming.places(rules, tree.shapes(expected))
    if slot.jax in plain
  ]
  quantised.require_floats(sources.told(source), weights, floats)
  where = "" if isinstance(source, Mapping) else f"{source}: "
  return f"{where}{kind} in {layout} names", rules


def _build(kind, source, fields, tensors: Tensors, dtype, weights) -> nn.Module:
  fields = {name: x for name, x in fields.items() if name != "weights"}
  try:
    module = KINDS[kind].build(
      fields,
      dtype=dtype or jnp.float32,
      param_dtype=dtype or matching.stored_dtype(tensors),
    )
  except (TypeError, ValueError) as e:
    where = "" if isinstance(source, Mapping) else f"{source}: "
    raise errors.UserError(f"{where}the configuration of {kind}: {e}") from e
  return rounding.with_weights(kind, module, weights) if weights else module
