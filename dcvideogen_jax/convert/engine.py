"""Converts weights between PyTorch and JAX, both ways, from one table.

A model's table has a `Rule` per kind of weight. Names are matched whole, and
every name on both sides has to be used exactly once. Loading reads pieces of
tensors straight into the host memory of a parameter's shards, a parameter at a
time, so that neither side is ever held twice.
"""

import concurrent.futures
import functools
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, tree
from dcvideogen_jax.convert import differences, hosting, sources

Shape = tuple[int, ...]

# Bytes of a tensor that a thread reads at once, and threads.
_PIECE = 4 << 20
_THREADS = 4


class Layout(NamedTuple):
  """How axes are ordered: `jax = torch.squeeze(ones).transpose(axes)`.

  Attributes:
    axes: of the squeezed tensor, in the order of the JAX array; None keeps it.
    ones: axes of the torch tensor that have size 1 and are dropped.
  """

  axes: tuple[int, ...] | None
  ones: tuple[int, ...] = ()

  def to_jax(self, x: np.ndarray) -> np.ndarray:
    x = x.squeeze(self.ones)
    return x if self.axes is None else x.transpose(self.axes)

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    if self.axes is not None:
      x = x.transpose(np.argsort(self.axes))
    return np.expand_dims(x, self.ones)

  def jax_shape(self, shape: Shape) -> Shape | None:
    """None if no tensor of this shape has this layout."""
    if any(i >= len(shape) or shape[i] != 1 for i in self.ones):
      return None
    kept = [n for i, n in enumerate(shape) if i not in self.ones]
    if self.axes is None:
      return tuple(kept)
    if len(kept) != len(self.axes):
      return None
    return tuple(kept[axis] for axis in self.axes)

  def torch_shape(self, shape: Shape) -> Shape:
    kept = [*shape]
    if self.axes is not None and len(shape) == len(self.axes):
      kept = [shape[axis] for axis in np.argsort(self.axes)]
    for i in sorted(self.ones):
      kept.insert(i, 1)
    return tuple(kept)

  @property
  def rows_axis(self) -> int:
    """Where the first axis of the torch tensor is in the JAX array."""
    return 0 if self.axes is None else self.axes.index(0)


COPY = Layout(None)
DENSE = Layout((1, 0))  # (out, in) -> (in, out)
CONV2D = Layout((2, 3, 1, 0))  # (out, in, h, w) -> (h, w, in, out)
CONV3D = Layout((2, 3, 4, 1, 0))  # (out, in, t, h, w) -> (t, h, w, in, out)


class Rule(NamedTuple):
  """One kind of weight: its name on both sides, with numbers as `{s}`.

  Attributes:
    torch: name in the state dict.
    jax: name of the parameter, such as "blocks/self_attn/q/kernel".
    layout: how the axes of the two are ordered.
    stack: `{i}` of the torch name is the index on the JAX array's first axis,
      which the torch tensors do not have.
    part: (k, n) for a tensor that is, in JAX layout, the k-th of n equal parts
      of the parameter's last axis, as q is of a fused q, k and v. Every part
      has a rule.
  """

  torch: str
  jax: str
  layout: Layout = COPY
  stack: bool = False
  part: tuple[int, int] | None = None


class Place(NamedTuple):
  """What a tensor fills: a parameter, or a layer or a part of it."""

  torch: str
  jax: str
  layer: int | None
  rule: Rule

  def region(self, leaf: Shape) -> list[tuple[int, int]]:
    """First and last index (not included) on each axis of the parameter."""
    region = [(0, n) for n in leaf]
    if self.rule.part is not None:
      k, n = self.rule.part
      width = leaf[-1] // n
      region[-1] = (k * width, (k + 1) * width)
    if self.layer is not None:
      region[0] = (self.layer, self.layer + 1)
    return region

  def torch_shape(self, leaf: Shape) -> Shape:
    """Shape of the tensor that fills this place of a parameter."""
    shape = tuple(stop - start for start, stop in self.region(leaf))
    return self.rule.layout.torch_shape(shape[self.layer is not None :])


def _pattern(name: str) -> re.Pattern[str]:
  return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(name)))


def places(rules: Sequence[Rule], leaves: Mapping[str, Shape]) -> list[Place]:
  """Every tensor that fills parameters of these shapes.

  Parameters that no rule knows are left out.
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
          found.append(Place(torch, name, i, rule))
      else:
        found.append(Place(rule.torch.format(**numbers), name, None, rule))
  return found


def torch_shapes(rules: Sequence[Rule], params: Any) -> dict[str, Shape]:
  """Shapes by PyTorch name of a parameter tree; its leaves may be abstract."""
  leaves = tree.shapes(params)
  return {
    place.torch: place.torch_shape(leaves[place.jax])
    for place in places(rules, leaves)
  }


def jax_shapes(
  rules: Sequence[Rule], tensors: Mapping[str, sources.Tensor]
) -> dict[str, Shape]:
  """Shapes by JAX name, as far as the rules know the tensors.

  A stacked parameter has as many layers as the largest index says.
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


def torch_to_jax(
  rules: Sequence[Rule],
  tensors: Mapping[str, sources.Tensor],
  expected: Any,
  what: str,
  shardings: Callable[[str, Shape], Any] = lambda name, shape: None,
) -> Any:
  """Fills a parameter tree from a PyTorch state dict.

  Parameters are made one after another: host memory peaks at what the devices
  share with the host (everything, on a CPU), plus two parameters' local shards
  and the pieces that are being read.

  Args:
    rules: the model's table.
    tensors: the state dict.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s; gives the dtypes.
    what: what is being loaded, for messages.
    shardings: name and shape of a parameter -> `jax.sharding.Sharding`; None
      for the default device.

  Raises:
    errors.UserError: lists every missing, unexpected and misshapen name, or
      names the tensor that holds a NaN or an infinity.
  """
  wanted = tree.flatten(expected)
  _require_rules(rules, tree.shapes(expected))
  differences.require_equal(
    torch_shapes(rules, expected),
    {name: tensor.shape for name, tensor in tensors.items()},
    what,
  )
  by_leaf: dict[str, list[Place]] = {name: [] for name in wanted}
  for place in places(rules, tree.shapes(expected)):
    by_leaf[place.jax].append(place)
  params, previous = {}, None
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for name, leaf in wanted.items():
      host = hosting.Host(leaf.shape, leaf.dtype, shardings(name, leaf.shape))
      _fill_all(pool, host, what, tensors, by_leaf[name])
      params[name] = host.to_devices()
      if previous is not None:  # At most two parameters are under way.
        previous.block_until_ready()
      previous = params[name]
  return flax.traverse_util.unflatten_dict(params, sep="/")


def _fill_all(
  pool: concurrent.futures.Executor,
  host: hosting.Host,
  what: str,
  tensors: Mapping[str, sources.Tensor],
  parts: Sequence[Place],
) -> None:
  """Reads everything that a parameter is made of."""
  filling = [
    pool.submit(_fill, host, what, tensors[place.torch], place, rows)
    for place in parts
    for rows in _pieces(tensors[place.torch], place)
  ]
  for future in filling:
    future.result()


def jax_to_torch(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
  """Turns a parameter tree into a PyTorch state dict of numpy arrays.

  Raises:
    errors.UserError: if a parameter has no rule.
  """
  return {
    name: tensor.read() for name, tensor in torch_tensors(rules, params).items()
  }


def torch_tensors(
  rules: Sequence[Rule], params: Any
) -> dict[str, sources.Tensor]:
  """The PyTorch state dict of a parameter tree, made tensor by tensor.

  Raises:
    errors.UserError: if a parameter has no rule.
  """
  leaves, shapes = tree.flatten(params), tree.shapes(params)
  _require_rules(rules, shapes)
  return {
    place.torch: sources.Tensor(
      place.torch_shape(shapes[place.jax]),
      np.dtype(leaves[place.jax].dtype),
      functools.partial(_take, leaves[place.jax], place),
    )
    for place in places(rules, shapes)
  }


def _take(leaf: Any, place: Place) -> np.ndarray:
  """The torch tensor that fills this place of a parameter."""
  array = np.asarray(leaf)
  array = array[tuple(slice(*ends) for ends in place.region(array.shape))]
  array = array if place.layer is None else array[0]
  array = place.rule.layout.to_torch(array)
  return np.ascontiguousarray(array).reshape(array.shape)


def unknown(rules: Sequence[Rule], leaves: Mapping[str, Shape]) -> list[str]:
  """Parameters that no rule knows."""
  return sorted(leaves.keys() - {p.jax for p in places(rules, leaves)})


def _require_rules(rules: Sequence[Rule], leaves: Mapping[str, Shape]) -> None:
  if missing := unknown(rules, leaves):
    raise errors.UserError(f"no rule converts {', '.join(missing)}")


def _pieces(
  tensor: sources.Tensor, place: Place
) -> Iterator[tuple[int, int] | None]:
  """Ranges of rows of a tensor to read at once; None stands for all of it."""
  if tensor.rows is None or 0 in place.rule.layout.ones or not tensor.shape:
    yield None
    return
  step = max(1, _PIECE // max(1, _row_bytes(tensor)))
  for start in range(0, tensor.shape[0], step):
    yield start, min(start + step, tensor.shape[0])


def _row_bytes(tensor: sources.Tensor) -> int:
  return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


def _fill(
  host: hosting.Host,
  what: str,
  tensor: sources.Tensor,
  place: Place,
  rows: tuple[int, int] | None,
) -> None:
  """Copies rows of a tensor to where they belong in a parameter."""
  region = place.region(host.shape)
  layout = place.rule.layout
  if rows is not None:
    axis = layout.rows_axis + (place.layer is not None)
    first = region[axis][0]
    region[axis] = (first + rows[0], first + rows[1])
  if not host.needs(region):
    return
  stored = tensor.read() if rows is None else _read(tensor, *rows)
  with np.errstate(over="ignore"):  # What does not fit is told below.
    array = stored.astype(host.dtype, copy=False)
  if not finite(array):
    reason = "NaN or infinity"
    if finite(stored):
      reason = f"values that {host.dtype.name} cannot hold"
    raise errors.UserError(f"{what}: {place.torch} holds {reason}")
  array = layout.to_jax(array)
  host.write(array if place.layer is None else array[None], region)


def same(a: sources.Tensor, b: sources.Tensor) -> bool:
  """Whether two tensors hold the same; they are read in pieces."""
  if a is b:
    return True
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  if a.rows is None or b.rows is None or not a.shape:
    return np.array_equal(a.read(), b.read())
  step = max(1, _PIECE // max(1, _row_bytes(a)))
  return all(
    np.array_equal(a.rows(i, stop, None), b.rows(i, stop, None))
    for i in range(0, a.shape[0], step)
    for stop in [min(i + step, a.shape[0])]
  )


_scratch = threading.local()


def _read(tensor: sources.Tensor, start: int, stop: int) -> np.ndarray:
  """Rows in memory that is this thread's until it reads again.

  Fresh memory for every piece would cost half as much again as the rest.
  """
  assert tensor.rows is not None  # Or `_pieces` gave no rows.
  size = (stop - start) * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
  memory = getattr(_scratch, "memory", None)
  if memory is None or memory.size < size:
    memory = _scratch.memory = np.empty(max(size, _PIECE), np.uint8)
  return tensor.rows(start, stop, memory)


def finite(x: np.ndarray) -> bool:
  """Whether no element is NaN or infinite."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return True
  if x.dtype == jnp.bfloat16:  # Its own isfinite is ten times slower.
    return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()
  return bool(np.isfinite(x).all())
