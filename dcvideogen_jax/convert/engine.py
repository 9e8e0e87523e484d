"""Converts weights between PyTorch and JAX, both ways, from one table.

A model's table has a `Rule` per kind of weight. Names are matched whole, and
every name on both sides has to be used exactly once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, tree
from dcvideogen_jax.convert import sources


class Layout(NamedTuple):
  """How axes are ordered: `jax = torch.transpose(axes)`."""

  axes: tuple[int, ...] | None

  def to_jax(self, x: np.ndarray) -> np.ndarray:
    return x if self.axes is None else x.transpose(self.axes)

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    return x if self.axes is None else x.transpose(np.argsort(self.axes))

  def jax_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    if self.axes is None or len(shape) != len(self.axes):
      return shape
    return tuple(shape[axis] for axis in self.axes)

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    if self.axes is None:
      return shape
    return tuple(shape[axis] for axis in np.argsort(self.axes))


COPY = Layout(None)
CONV3D = Layout((2, 3, 4, 1, 0))  # (out, in, t, h, w) -> (t, h, w, in, out)


class Rule(NamedTuple):
  """One kind of weight: its name on both sides, with numbers as `{i}`."""

  torch: str
  jax: str
  layout: Layout = COPY


def _rename(
  rules: Sequence[Rule], names: Iterable[str], to_jax: bool
) -> dict[str, tuple[str, Layout]]:
  """Name on one side -> (name on the other, layout); unmatched left out."""
  compiled = []
  for rule in rules:
    old, new = (rule.torch, rule.jax) if to_jax else (rule.jax, rule.torch)
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(old))
    compiled.append((re.compile(pattern), new, rule.layout))
  renamed = {}
  for name in names:
    for expression, new, layout in compiled:
      if match := expression.fullmatch(name):
        renamed[name] = (new.format(**match.groupdict()), layout)
        break
  return renamed


def jax_shapes(
  rules: Sequence[Rule], tensors: Mapping[str, sources.Tensor]
) -> dict[str, tuple[int, ...]]:
  """Shapes by JAX name; names that no rule knows keep their own."""
  shapes = {}
  renamed = _rename(rules, tensors, to_jax=True)
  for name, tensor in tensors.items():
    new, layout = renamed.get(name, (name, COPY))
    shapes[new] = layout.jax_shape(tensor.shape)
  return shapes


def torch_shapes(
  rules: Sequence[Rule], params: Any
) -> dict[str, tuple[int, ...]]:
  """Shapes by PyTorch name of a parameter tree; its leaves may be abstract."""
  shapes = tree.shapes(params)
  renamed = _rename(rules, shapes, to_jax=False)
  return {
    new: layout.torch_shape(shapes[name])
    for name, (new, layout) in renamed.items()
  }


def torch_to_jax(
  rules: Sequence[Rule],
  tensors: Mapping[str, sources.Tensor],
  expected: Any,
  what: str,
) -> Any:
  """Fills a parameter tree from a PyTorch state dict, tensor by tensor.

  Args:
    rules: the model's table.
    tensors: the state dict. Names may also be ours already ("a/b/c"), in our
      layout.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s; gives the dtypes.
    what: what is being loaded, for messages.

  Raises:
    errors.UserError: lists every missing, unexpected and misshapen name, or
      names the tensor that holds a NaN or an infinity.
  """
  wanted = tree.flatten(expected)
  tree.require_equal(tree.shapes(expected), jax_shapes(rules, tensors), what)
  renamed = _rename(rules, tensors, to_jax=True)
  params = {}
  for name, tensor in tensors.items():
    new, layout = renamed.get(name, (name, COPY))
    array = tensor.read()
    if not _finite(array):
      raise errors.UserError(f"{what}: {name} holds NaN or infinity")
    array = layout.to_jax(array).astype(wanted[new].dtype, copy=False)
    params[new] = jnp.asarray(np.ascontiguousarray(array))
  return flax.traverse_util.unflatten_dict(params, sep="/")


def jax_to_torch(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
  """Turns a parameter tree into a PyTorch state dict of numpy arrays.

  Raises:
    errors.UserError: if a parameter has no rule.
  """
  leaves = tree.flatten(params)
  renamed = _rename(rules, leaves, to_jax=False)
  if unknown := sorted(leaves.keys() - renamed.keys()):
    raise errors.UserError(f"no rule converts {', '.join(unknown)}")
  state_dict = {}
  for name, (new, layout) in renamed.items():
    array = layout.to_torch(np.asarray(jax.device_get(leaves[name])))
    state_dict[new] = np.ascontiguousarray(array)
  return state_dict


def _finite(x: np.ndarray) -> bool:
  """Whether no element is NaN or infinite."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return True
  if x.dtype == jnp.bfloat16:  # Its own isfinite is ten times slower.
    return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()
  return bool(np.isfinite(x).all())
