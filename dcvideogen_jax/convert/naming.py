"""Tables of names: which PyTorch tensor fills which JAX parameter.

A model's table has one `Rule` per kind of weight. A rule matches whole names,
and every name on both sides has to be used exactly once.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcvideogen_jax import tree
from dcvideogen_jax.convert import reading

Shape = tuple[int, ...]


class Layout(NamedTuple):
  """Order of axes: `jax = torch.squeeze(squeezed_axes).transpose(axes)`.

  Attributes:
    axes: axes of the squeezed torch tensor in the order of the JAX array; None
      keeps their order.
    squeezed_axes: axes of the torch tensor that have size 1 and are dropped.
  """

  axes: tuple[int, ...] | None
  squeezed_axes: tuple[int, ...] = ()

  def to_jax(self, x: np.ndarray) -> np.ndarray:
    """Returns a view of a torch tensor's array with the axes of JAX."""
    x = x.squeeze(self.squeezed_axes)
    return x if self.axes is None else x.transpose(self.axes)

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    """Returns a view of a JAX array with the axes of the torch tensor."""
    if self.axes is not None:
      x = x.transpose(np.argsort(self.axes))
    return np.expand_dims(x, self.squeezed_axes)

  def jax_shape(self, shape: Shape) -> Shape | None:
    """Returns the JAX shape of a torch shape, or None if it does not fit."""
    if any(i >= len(shape) or shape[i] != 1 for i in self.squeezed_axes):
      return None
    kept = [n for i, n in enumerate(shape) if i not in self.squeezed_axes]
    if self.axes is None:
      return tuple(kept)
    if len(kept) != len(self.axes):
      return None
    return tuple(kept[axis] for axis in self.axes)

  def torch_shape(self, shape: Shape) -> Shape:
    """Returns the torch shape of a JAX shape."""
    kept = [*shape]
    if self.axes is not None and len(shape) == len(self.axes):
      kept = [shape[axis] for axis in np.argsort(self.axes)]
    for i in sorted(self.squeezed_axes):
      kept.insert(i, 1)
    return tuple(kept)

  @property
  def rows_axis(self) -> int:
    """The axis of the JAX array that is the torch tensor's first axis."""
    return 0 if self.axes is None else self.axes.index(0)


COPY = Layout(None)
DENSE = Layout((1, 0))  # (out, in) -> (in, out)
CONV2D = Layout((2, 3, 1, 0))  # (out, in, h, w) -> (h, w, in, out)
CONV3D = Layout((2, 3, 4, 1, 0))  # (out, in, t, h, w) -> (t, h, w, in, out)


class Rule(NamedTuple):
  """One kind of weight and its names in PyTorch and in JAX.

  A placeholder such as `{s}`, in both names, stands for a number.

  Attributes:
    torch: name in the state dict.
    jax: name of the parameter, such as "blocks/self_attn/q/kernel".
    layout: order of the axes of the two.
    stack: whether the parameter stacks layers on its first axis, which the
      torch tensors do not have; `{i}` in the torch name is the layer's index.
    part: (k, n) if the tensor, in JAX layout, is the k-th of n equal parts of
      the parameter's last axis, k from 0, as q is of a fused q, k and v. Every
      part has its own rule.
  """

  torch: str
  jax: str
  layout: Layout = COPY
  stack: bool = False
  part: tuple[int, int] | None = None


def linear(
  torch: str,
  jax: str,
  layout: Layout = DENSE,
  *,
  stack: bool = False,
  part: tuple[int, int] | None = None,
) -> list[Rule]:
  """Returns the rules of weight and bias of a linear layer or a convolution.

  Args:
    torch: name of the layer in the state dict.
    jax: name of the layer in the parameter tree.
    layout: order of the weight's axes.
    stack, part: as in `Rule`.
  """
  return [
    Rule(f"{torch}.weight", f"{jax}/kernel", layout, stack, part),
    Rule(f"{torch}.bias", f"{jax}/bias", COPY, stack, part),
  ]


def with_scales(rules: Sequence[Rule]) -> list[Rule]:
  """Adds rules for the scales of stacked kernels in eight bits.

  The names and the shape (out, 1) are those of LightX2V's quantised files.
  """
  return [
    *rules,
    *(
      Rule(
        f"{rule.torch}_scale",
        rule.jax.removesuffix("kernel") + "scale",
        Layout(None, (1,)),
        stack=True,
      )
      for rule in rules
      if rule.stack and rule.jax.endswith("/kernel")
    ),
  ]


def norm(torch: str, jax: str, *, stack: bool = False) -> list[Rule]:
  """Returns the rules of weight and bias of a norm.

  Args:
    torch: name of the norm in the state dict.
    jax: name of the norm in the parameter tree.
    stack: as in `Rule`.
  """
  return [
    Rule(f"{torch}.weight", f"{jax}/scale", COPY, stack),
    Rule(f"{torch}.bias", f"{jax}/bias", COPY, stack),
  ]


class TensorSlot(NamedTuple):
  """The parameter, or the layer or part of a parameter, that a tensor fills.

  Attributes:
    torch: name of the tensor.
    jax: name of the parameter.
    layer: index on the first axis of a stacked parameter; None for others.
    rule: the rule that matches both names.
  """

  torch: str
  jax: str
  layer: int | None
  rule: Rule

  def region(self, leaf: Shape) -> list[tuple[int, int]]:
    """Returns (start, stop) on each axis of a parameter of shape `leaf`."""
    region = [(0, n) for n in leaf]
    if self.rule.part is not None:
      k, n = self.rule.part
      width = leaf[-1] // n
      region[-1] = (k * width, (k + 1) * width)
    if self.layer is not None:
      region[0] = (self.layer, self.layer + 1)
    return region

  def torch_shape(self, leaf: Shape) -> Shape:
    """Returns the torch shape of the tensor for a parameter of shape `leaf`."""
    shape = tuple(stop - start for start, stop in self.region(leaf))
    return self.rule.layout.torch_shape(shape[self.layer is not None :])


def _pattern(name: str) -> re.Pattern[str]:
  return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(name)))


def places(
  rules: Sequence[Rule], leaves: Mapping[str, Shape]
) -> list[TensorSlot]:
  """Returns a slot for every tensor that fills the parameters.

  Parameters that no rule matches are left out.

  Args:
    rules: the model's table.
    leaves: name -> shape of the parameters.
  """
  compiled = [(_pattern(rule.jax), rule) for rule in rules]
  found = []
  for name, shape in leaves.items():
    whole = False
    for expression, rule in compiled:
      match = expression.fullmatch(name)
      if not match or whole:
        continue
      whole = rule.part is None
      numbers = match.groupdict()
      if rule.stack:
        for i in range(shape[0]):
          torch = rule.torch.format(**numbers, i=i)
          found.append(TensorSlot(torch, name, i, rule))
      else:
        found.append(TensorSlot(rule.torch.format(**numbers), name, None, rule))
  return found


def torch_shapes(rules: Sequence[Rule], params: Any) -> dict[str, Shape]:
  """Returns PyTorch name -> torch shape for the tensors of a parameter tree.

  The leaves may be `jax.ShapeDtypeStruct`s.
  """
  leaves = tree.shapes(params)
  return {
    place.torch: place.torch_shape(leaves[place.jax])
    for place in places(rules, leaves)
  }


def jax_shapes(
  rules: Sequence[Rule], tensors: Mapping[str, reading.Tensor]
) -> dict[str, Shape]:
  """Returns JAX name -> shape for the parameters that the tensors fill.

  Tensors that no rule matches are left out. The number of layers of a stacked
  parameter follows from the largest index in its tensors' names.
  """
  compiled = [(_pattern(rule.torch), rule) for rule in rules]
  shapes: dict[str, Shape] = {}
  for name, tensor in tensors.items():
    for expression, rule in compiled:
      if not (match := expression.fullmatch(name)):
        continue
      numbers = match.groupdict()
      shape = rule.layout.jax_shape(tensor.shape) or tensor.shape
      if rule.part is not None:
        shape = (*shape[:-1], shape[-1] * rule.part[1])
      if rule.stack:
        layer = int(numbers.pop("i"))
        known = shapes.get(rule.jax.format(**numbers), (0,))
        shape = (max(known[0], layer + 1), *shape)
      shapes[rule.jax.format(**numbers)] = shape
  return shapes


def unknown(rules: Sequence[Rule], leaves: Mapping[str, Shape]) -> list[str]:
  """Returns the names of the parameters that no rule matches, sorted."""
  return sorted(leaves.keys() - {p.jax for p in places(rules, leaves)})
