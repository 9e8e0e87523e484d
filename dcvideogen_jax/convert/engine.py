"""Converts weights from PyTorch to JAX and back, with one table for both ways.

Loading reads pieces of tensors directly into the host buffers of a parameter's
shards, one parameter at a time, so neither the state dict nor the parameters
are held twice.
"""

import concurrent.futures
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import hosting, naming, sources

# Bytes of a tensor that a thread reads at once, and the number of threads.
_PIECE = 4 << 20
_THREADS = 4


def torch_to_jax(
  rules: Sequence[naming.Rule],
  tensors: Mapping[str, sources.Tensor],
  expected: Any,
  what: str,
  shardings: Callable[[str, naming.Shape], Any] = lambda name, shape: None,
) -> Any:
  """Fills a parameter tree from a PyTorch state dict.

  Parameters are made one after another. Peak host memory is what the devices
  share with the host (on a CPU, all parameters), plus the local shards of two
  parameters and the pieces that are being read.

  Args:
    rules: the model's table.
    tensors: the state dict.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s; the result has its
      dtypes.
    what: what is being loaded, for messages.
    shardings: name and shape of a parameter -> `jax.sharding.Sharding`; None
      for the default device.

  Raises:
    errors.UserError: lists every name that is missing, unexpected or has
      another shape; lists parameters without a rule; or names a tensor that
      holds NaN, infinity or values that the dtype cannot hold.
  """
  wanted = tree.flatten(expected)
  _require_rules(rules, tree.shapes(expected))
  differences.require_equal(
    naming.torch_shapes(rules, expected),
    {name: tensor.shape for name, tensor in tensors.items()},
    what,
  )
  by_leaf: dict[str, list[naming.TensorSlot]] = {name: [] for name in wanted}
  for place in naming.places(rules, tree.shapes(expected)):
    by_leaf[place.jax].append(place)
  params, previous = {}, None
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for name, leaf in wanted.items():
      host = hosting.HostShards(
        leaf.shape, leaf.dtype, shardings(name, leaf.shape)
      )
      filling = [
        pool.submit(_fill, host, what, tensors[slot.torch], slot, rows)
        for slot in by_leaf[name]
        for rows in _pieces(tensors[slot.torch], slot)
      ]
      for future in filling:
        future.result()
      params[name] = host.to_devices()
      if previous is not None:  # At most two parameters are in flight.
        previous.block_until_ready()
      previous = params[name]
  return flax.traverse_util.unflatten_dict(params, sep="/")


def torch_tensors(
  rules: Sequence[naming.Rule], params: Any
) -> dict[str, sources.Tensor]:
  """Returns the PyTorch state dict of a parameter tree.

  Each tensor is made when it is read.

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
    for place in naming.places(rules, shapes)
  }


def _take(leaf: Any, place: naming.TensorSlot) -> np.ndarray:
  """Returns the torch tensor of a slot of the parameter `leaf`."""
  array = np.asarray(leaf)
  array = array[tuple(slice(*ends) for ends in place.region(array.shape))]
  array = array if place.layer is None else array[0]
  array = place.rule.layout.to_torch(array)
  return np.ascontiguousarray(array).reshape(array.shape)


def _require_rules(
  rules: Sequence[naming.Rule], leaves: Mapping[str, naming.Shape]
) -> None:
  if missing := naming.unknown(rules, leaves):
    raise errors.UserError(f"no rule converts {', '.join(missing)}")


def _pieces(
  tensor: sources.Tensor, place: naming.TensorSlot
) -> Iterator[tuple[int, int] | None]:
  """Yields ranges of rows to read at once; None stands for all rows."""
  if (
    tensor.rows is None
    or 0 in place.rule.layout.squeezed_axes
    or not tensor.shape
  ):
    yield None
    return
  yield from _ranges(tensor)


def _ranges(tensor: sources.Tensor) -> Iterator[tuple[int, int]]:
  """Yields ranges that cover all rows, each of about `_PIECE` bytes."""
  step = max(1, _PIECE // max(1, _row_bytes(tensor)))
  for start in range(0, tensor.shape[0], step):
    yield start, min(start + step, tensor.shape[0])


def _row_bytes(tensor: sources.Tensor) -> int:
  return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


def _fill(
  host: hosting.HostShards,
  what: str,
  tensor: sources.Tensor,
  place: naming.TensorSlot,
  rows: tuple[int, int] | None,
) -> None:
  """Copies rows of a tensor to their place in the buffers of a parameter."""
  region = place.region(host.shape)
  layout = place.rule.layout
  if rows is not None:
    axis = layout.rows_axis + (place.layer is not None)
    first = region[axis][0]
    region[axis] = (first + rows[0], first + rows[1])
  if not host.needs(region):
    return
  stored = tensor.read() if rows is None else _read(tensor, *rows)
  with np.errstate(over="ignore"):  # Values that overflow are reported below.
    array = stored.astype(host.dtype, copy=False)
  if not finite(array):
    reason = "NaN or infinity"
    if finite(stored):
      reason = f"values that {host.dtype.name} cannot hold"
    raise errors.UserError(f"{what}: {place.torch} holds {reason}")
  array = layout.to_jax(array)
  host.write(array if place.layer is None else array[None], region)


def same(a: sources.Tensor, b: sources.Tensor) -> bool:
  """Whether two tensors have equal values and dtypes; reads them in pieces."""
  if a is b:
    return True
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  if a.rows is None or b.rows is None or not a.shape:
    return np.array_equal(a.read(), b.read())
  return all(
    np.array_equal(a.rows(*ends, None), b.rows(*ends, None))
    for ends in _ranges(a)
  )


_scratch = threading.local()


def _read(tensor: sources.Tensor, start: int, stop: int) -> np.ndarray:
  """Reads rows into this thread's buffer, which its next read overwrites.

  Allocating memory for every piece would add half to the time of loading.
  """
  assert tensor.rows is not None  # Otherwise `_pieces` yields None.
  size = (stop - start) * _row_bytes(tensor)
  memory = getattr(_scratch, "memory", None)
  if memory is None or memory.size < size:
    memory = _scratch.memory = np.empty(max(size, _PIECE), np.uint8)
  return tensor.rows(start, stop, memory)


def finite(x: np.ndarray) -> bool:
  """Whether no element is NaN or infinite."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return True
  if x.dtype == jnp.bfloat16:  # np.isfinite is ten times slower for it.
    return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()
  return bool(np.isfinite(x).all())
