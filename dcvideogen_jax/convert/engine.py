"""Converts weights from PyTorch to JAX and back, with one table for both ways.

Loading reads pieces of tensors directly into the host buffers of a parameter's
shards, one parameter at a time, so neither the state dict nor the parameters
are held twice.
"""

import concurrent.futures
import functools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import tqdm

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import hosting, naming, sources
from dcvideogen_jax.models import eight_bits

# Bytes of a tensor that a thread reads at once, and the number of threads.
_PIECE = 4 << 20
_THREADS = 4


def torch_to_jax(
  rules: Sequence[naming.Rule],
  tensors: Mapping[str, sources.Tensor],
  expected: Any,
  what: str,
  shardings: Callable[[str, naming.Shape], Any] = lambda name, shape: None,
  only: Callable[[str], bool] | None = None,
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
    only: name of a parameter -> whether it is read; None reads all. The others
      are checked, and are not part of the result.

  Returns:
    The parameter tree. Kernels that `expected` has in eight bits (see
    `models.eight_bits`) and the state dict in floats are rounded as they are
    read, with a progress bar on a terminal.

  Raises:
    errors.UserError: lists every name that is missing, unexpected or has
      another shape; lists parameters without a rule; or names a tensor that
      holds NaN, infinity or values that the dtype cannot hold.
  """
  every = tree.flatten(expected)
  _require_rules(rules, tree.shapes(expected))
  scales = rounded(rules, tensors, every)
  expected = {
    name: leaf for name, leaf in every.items() if name not in scales.values()
  }
  differences.require_equal(
    naming.torch_shapes(rules, expected),
    {name: tensor.shape for name, tensor in tensors.items()},
    what,
  )
  wanted = {n: x for n, x in expected.items() if only is None or only(n)}
  slots: dict[str, list[naming.TensorSlot]] = {name: [] for name in wanted}
  for place in naming.places(rules, tree.shapes(expected)):
    if place.jax in wanted:
      slots[place.jax].append(place)
  params: dict[str, Any] = {}
  again: set[str | None] = set()
  previous = None
  with (
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    _progress(scales.keys() & wanted.keys(), slots) as bar,
  ):
    for name in wanted:
      names = [name, scales[name]] if name in scales else [name]
      hosts = [
        hosting.HostShards(x.shape, x.dtype, shardings(n, x.shape))
        for n, x in ((n, every[n]) for n in names)
      ]
      filling = [
        pool.submit(_fill, hosts, what, tensors[slot.torch], slot, rows)
        for slot in slots[name]
        for rows in _pieces(tensors[slot.torch], slot)
      ]
      again |= {future.result() for future in filling}
      params |= {
        n: host.to_devices() for n, host in zip(names, hosts, strict=True)
      }
      bar.update(len(slots[name]) if name in scales else 0)
      if previous is not None:  # At most two parameters are in flight.
        previous.block_until_ready()
      previous = params[name]
  if formats := sorted(name for name in again if name):
    warnings.warn(
      f"{what}: weights in {', '.join(formats)} are rounded again, to eight"
      " bits with a scale per output channel",
      stacklevel=2,
    )
  return flax.traverse_util.unflatten_dict(params, sep="/")


def rounded(
  rules: Sequence[naming.Rule],
  tensors: Mapping[str, sources.Tensor],
  wanted: Mapping[str, Any],
) -> dict[str, str]:
  """Finds kernels that are rounded to eight bits: no tensor holds their scales.

  Args:
    rules: the rules of the tensors' layout.
    tensors: tensors by their plain names.
    wanted: the parameters as `jax.ShapeDtypeStruct`s, by name.

  Returns:
    The names of the kernels and of their scales.
  """
  found = {}
  for name, leaf in wanted.items():
    scale = re.sub("kernel$", "scale", name)
    if not eight_bits.is_stored(leaf.dtype) or scale not in wanted:
      continue
    shape = {scale: wanted[scale].shape}
    if not any(x.torch in tensors for x in naming.places(rules, shape)):
      found[name] = scale
  return found


def _progress(names, slots) -> tqdm.tqdm:
  """Returns a progress bar over the kernels of all layers that are rounded."""
  return tqdm.tqdm(
    total=sum(len(slots[name]) for name in names),
    desc="rounding to eight bits",
    unit=" kernels",
    disable=None if names else True,
    leave=False,
  )


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
  hosts: Sequence[hosting.HostShards],
  what: str,
  tensor: sources.Tensor,
  place: naming.TensorSlot,
  rows: tuple[int, int] | None,
) -> str | None:
  """Copies rows of a tensor to their place in the buffers of a parameter.

  Args:
    hosts: the buffers of the parameter and, if it is rounded to eight bits, of
      its scale. A rounded kernel has its output channels in the tensor's rows.
    what: as for `torch_to_jax`.
    tensor: the tensor.
    place: the slot that the tensor fills.
    rows: (start, stop), or None for all.

  Returns:
    The format of a quantised tensor that is rounded again, else None.
  """
  host, *scales = hosts
  region = place.region(host.shape)
  layout = place.rule.layout
  if rows is not None:
    axis = layout.rows_axis + (place.layer is not None)
    first = region[axis][0]
    region[axis] = (first + rows[0], first + rows[1])
  if not any(x.needs(part) for x, part in _regions(hosts, region)):
    return None
  eight = eight_bits.is_stored(host.dtype)
  if eight and not scales and tensor.dtype != host.dtype:
    raise errors.UserError(
      f"{what}: {place.torch} has a scale, so expected {host.dtype.name}, found"
      f" {tensor.dtype.name}"
    )
  again = None
  taken = _taken(tensor, host.dtype, rows) if scales else None
  if taken is None:
    array = _read_as(tensor, rows, host.dtype, f"{what}: {place.torch}")
    taken = [array]
    if scales:
      name = eight_bits.format_of(host.dtype)
      taken = [*eight_bits.quantise(array, name, axis=1)]
      again = tensor.stored and tensor.stored.format
  elif not all(map(finite, taken)):
    raise errors.UserError(f"{what}: {place.torch} holds NaN or infinity")
  taken[0] = layout.to_jax(taken[0])
  for (x, part), values in zip(_regions(hosts, region), taken, strict=True):
    x.write(values if place.layer is None else values[None], part)
  return again


def _read_as(
  tensor: sources.Tensor,
  rows: tuple[int, int] | None,
  dtype: np.dtype,
  what: str,
) -> np.ndarray:
  """Reads rows in a dtype, in float32 if it is one of eight bits.

  Raises:
    errors.UserError: if a value is not finite, or beyond the dtype.
  """
  stored = tensor.read() if rows is None else _read(tensor, *rows)
  if eight_bits.is_stored(dtype) and stored.dtype != dtype:
    dtype = np.dtype(np.float32)
  with np.errstate(over="ignore"):  # Values that overflow are reported below.
    array = stored.astype(dtype, copy=False)
  if not finite(array):
    reason = "NaN or infinity"
    if finite(stored):
      reason = f"values that {dtype.name} cannot hold"
    raise errors.UserError(f"{what} holds {reason}")
  return array


def _taken(
  tensor: sources.Tensor, dtype: np.dtype, rows: tuple[int, int] | None
) -> list[np.ndarray] | None:
  """Returns numbers and scales of rows as a file holds them, or None.

  They are used so if the numbers have the dtype of the kernel, and every scale
  is that of whole rows or, for plain casts to float8, there is none.
  """
  if tensor.stored is None and tensor.dtype == dtype:
    numbers = tensor.read() if rows is None else _read(tensor, *rows)
    return [numbers, np.ones((len(numbers), *numbers.shape[2:]), np.float32)]
  if (
    tensor.stored is None
    or tensor.stored.dtype != dtype
    or tensor.stored.block[1] < math.prod(tensor.shape[1:])
  ):
    return None
  start, stop = rows or (0, tensor.shape[0])
  found = tensor.stored.rows(start, stop)
  if found.offsets is not None:
    return None
  scales = np.repeat(found.scales[:, 0], found.block[0])[: stop - start]
  return [found.values, scales]


def _regions(
  hosts: Sequence[hosting.HostShards], region: list[tuple[int, int]]
) -> Iterator[tuple[hosting.HostShards, list[tuple[int, int]]]]:
  """Yields buffers with their part of a kernel's region (..., in, out)."""
  yield hosts[0], region
  for scale in hosts[1:]:
    yield scale, [*region[:-2], region[-1]]


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
  if x.dtype == jnp.float8_e4m3fn:
    return not ((x.view(np.uint8) & 0x7F) == 0x7F).any()
  if x.dtype == jnp.bfloat16:  # np.isfinite is ten times slower for it.
    return not ((x.view(np.uint16) & 0x7F80) == 0x7F80).any()
  return bool(np.isfinite(x).all())
