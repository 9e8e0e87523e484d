"""Makes the PyTorch state dicts and the configurations of models."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import engine, kinds, matching, naming, sources

KINDS = kinds.KINDS
Variables = dict[str, Any]


def to_torch(
  kind: str,
  module: nn.Module,
  variables: Variables,
  layout: str | None = None,
) -> dict[str, np.ndarray]:
  """Converts a model to a PyTorch state dict of numpy arrays, bit for bit.

  Args:
    kind: a key of `KINDS`.
    module: the model.
    variables: `{"params": ...}`.
    layout: name of one of the kind's layouts; None is the first.

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
  """Converts as `to_torch` does, but each tensor only when it is read.

  Args:
    kind, module, variables, layout: as for `to_torch`.

  Raises:
    errors.UserError: as `to_torch` does.
  """
  rules = rules_of(kind, layout)
  params = variables["params"]
  differences.require_equal(
    tree.shapes(matching.parameters(kind, module)),
    tree.shapes(params),
    f"the parameters of {kind}",
  )
  return engine.torch_tensors(rules, params)


def rules_of(kind: str, layout: str | None) -> Sequence[naming.Rule]:
  """Returns the rules of a layout; None is the kind's first layout.

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
  """Returns the fields of the architecture, without those of a single run."""
  run = {"parent", "name", "dtype", "param_dtype", "remat", "conv3d"}
  run |= {"attention", "lora_rank", "lora_alpha"}
  fields = {
    name: getattr(module, name)
    for name in type(module).__dataclass_fields__
    if name not in run
  }
  if fields.get("weights", 0) is None:
    del fields["weights"]
  return fields


def shardings(sharding: Any, expected: Any) -> Callable[..., Any]:
  """Returns a function from a parameter's name and shape to its sharding.

  Args:
    sharding: as for `api.load`.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.

  Raises:
    errors.UserError: if a parameter has no sharding.
  """
  if callable(sharding):
    sharding = sharding({"params": expected})
  if sharding is None or isinstance(sharding, jax.sharding.Sharding):
    return lambda name, shape: sharding
  by_name = tree.flatten(sharding["params"])
  if missing := sorted(tree.flatten(expected).keys() - by_name.keys()):
    raise errors.UserError(f"no sharding is given for {', '.join(missing)}")
  return lambda name, shape: by_name[name]
