"""Models whose kernels are in eight bits: which format, and rounding to one."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from dcvideogen_jax import documents, errors
from dcvideogen_jax.convert import engine, matching, sources, state_dicts
from dcvideogen_jax.models import eight_bits

# What `weights` may be: formats in eight bits, or the kernels as other weights.
WEIGHTS = (*eight_bits.FORMATS, "bfloat16")


def choose(
  kind: str, source: sources.Source, asked: str | None, stored: str | None
) -> str | None:
  """Returns the format of a model's kernels in memory; None for plain floats.

  Args:
    kind, source: for messages.
    asked: one of `WEIGHTS`, or None for the format of the source.
    stored: the format that the source has its kernels in; None for floats.

  Raises:
    errors.UserError: for an unknown format, or for another one than that of a
      source in eight bits, whose original values are gone.
  """
  if asked not in (None, *WEIGHTS):
    raise errors.UserError(
      f"weights must be one of {', '.join(WEIGHTS)}, found {asked!r}"
    )
  if stored not in (None, *eight_bits.FORMATS):
    raise errors.UserError(
      f'{sources.told(source)}: "weights" in config.json must be one of'
      f" {', '.join(eight_bits.FORMATS)}, found {stored!r}"
    )
  if None not in (asked, stored) and asked != stored:
    raise errors.UserError(
      f"{sources.told(source)}: the weights of {kind} are in {stored}, expected"
      f" the original ones for weights in {asked}"
    )
  chosen = asked or stored
  return chosen if chosen in eight_bits.FORMATS else None


def require_plain(name: str, dtype: Any) -> None:
  """Refuses to change a kernel that is in eight bits.

  Raises:
    errors.UserError: if the dtype is that of a format of `eight_bits`.
  """
  if eight_bits.is_stored(dtype):
    raise errors.UserError(
      f"{name} is in {eight_bits.format_of(dtype)}, to which nothing can be"
      " added exactly: expected the original weights, to which adapters are"
      " added before they are rounded"
    )


def host() -> jax.sharding.Sharding:
  """Returns the placement of arrays in the host's memory.

  Raises:
    errors.UserError: if jax was told to leave the CPU out.
  """
  try:
    (device, *_) = jax.local_devices(backend="cpu")
  except RuntimeError as e:
    raise errors.UserError(
      f"jax does not see the CPU ({e}): expected JAX_PLATFORMS unset, or with"
      " cpu in it"
    ) from e
  return jax.sharding.SingleDeviceSharding(device)


def beside(source: sources.Source) -> str | None:
  """Returns the format in the config.json of a directory that `save` wrote.

  Returns None for any other source; errors are left to `matching.find_config`.
  """
  if isinstance(source, Mapping):
    return None
  path = pathlib.Path(source)
  try:
    path = (path if path.is_dir() else path.parent) / "config.json"
    fields = documents.parse(path.read_bytes())
    return fields.get("weights") if "kind" in fields else None
  except (OSError, ValueError, TypeError, AttributeError):
    return None


def with_weights(kind: str, module: nn.Module, weights: str) -> nn.Module:
  """Returns the module with kernels in eight bits.

  Raises:
    errors.UserError: if the kind of model has no such kernels.
  """
  if not hasattr(module, "weights"):
    raise errors.UserError(
      f"a {kind} has no weights in {weights}: expected wan_dit or umt5"
    )
  return module.clone(weights=weights)


def in_eight_bits(
  kind: str,
  module: nn.Module,
  variables: state_dicts.Variables,
  weights: str,
  sharding: Any = None,
) -> tuple[Any, state_dicts.Variables]:
  """Rounds the kernels of a model's blocks, layer by layer.

  Args:
    kind: a key of `kinds.KINDS`.
    module: a model with other kernels.
    variables: `{"params": ...}`, best in host memory (`host`).
    weights: "int8" or "float8".
    sharding: of the result, as for `api.load`.

  Returns:
    The module with `weights`, and its variables.
  """
  tensors = state_dicts.to_tensors(kind, module, variables)
  module = with_weights(kind, module, weights)
  rules = state_dicts.rules_of(kind, None)
  expected = matching.parameters(kind, module)
  expected = matching.as_stored(rules, tensors, expected)
  shardings = state_dicts.shardings(sharding, expected)
  return module, {
    "params": engine.torch_to_jax(rules, tensors, expected, kind, shardings)
  }
