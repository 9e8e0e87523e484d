"""Buffers in host memory that hold one parameter until the devices get it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

# (start, stop) on each axis; stop is not included.
Region = Sequence[tuple[int, int]]

# Bytes. XLA on a CPU uses host memory of this alignment without a copy.
_ALIGNMENT = 64
# Rows that are transposed at once: one or two cache lines of elements.
_BLOCK = 64


class HostShards:
  """A buffer for each distinct shard of a parameter on this process's devices.

  Attributes:
    shape: shape of the whole parameter.
    dtype: dtype of the parameter.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None = None,
  ):
    """Allocates the buffers; without a sharding, one for the default device."""
    self.shape = tuple(shape)
    self.dtype = np.dtype(dtype)
    self._sharding = sharding
    whole = tuple((0, n) for n in self.shape)
    self._devices = {None: whole}
    if sharding is not None:
      indices: Any = sharding.addressable_devices_indices_map(self.shape)
      self._devices = {
        device: tuple(
          s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)
        )
        for device, index in indices.items()
      }
    self._buffers = {
      region: _aligned([stop - start for start, stop in region], dtype)
      for region in set(self._devices.values())
    }

  def needs(self, region: Region) -> bool:
    """Whether a region overlaps any of the buffered shards."""
    return any(_overlap(region, shard) for shard in self._buffers)

  def write(self, array: np.ndarray, region: Region) -> None:
    """Copies the values of a region into the shards that hold them."""
    for shard, buffer in self._buffers.items():
      overlap = _overlap(region, shard)
      if overlap is None:
        continue
      source, target = (
        tuple(
          slice(a - start, b - start)
          for (a, b), (start, _) in zip(overlap, whole, strict=True)
        )
        for whole in (region, shard)
      )
      _copy(buffer[target], array[source])

  def to_devices(self) -> jax.Array:
    """Returns the parameter, which may use the buffers as its own memory.

    The buffers must not be written afterwards.
    """
    if self._sharding is None:
      ((_, buffer),) = self._buffers.items()
      return jax.device_put(buffer, may_alias=True)
    return jax.make_array_from_single_device_arrays(
      self.shape,
      self._sharding,
      [
        jax.device_put(self._buffers[region], device, may_alias=True)
        for device, region in self._devices.items()
      ],
    )


def _overlap(a: Region, b: Region) -> Region | None:
  common = tuple(
    (max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True)
  )
  return None if any(start >= stop for start, stop in common) else common


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  dtype = np.dtype(dtype)
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
  """Casts and copies as `target[...] = source` does, but faster.

  Custom dtypes such as bfloat16 are copied as bits, and a transposed source is
  copied in blocks that fit into the cache.
  """
  if target.dtype != source.dtype:
    source = source.astype(target.dtype)
  bits = np.dtype(f"u{target.dtype.itemsize}")
  target, source = target.view(bits), source.view(bits)
  if source.ndim < 2 or source.flags.c_contiguous:
    target[...] = source
    return
  axis = int(np.argmax(source.strides))
  for start in range(0, source.shape[axis], _BLOCK):
    block = (slice(None),) * axis + (slice(start, start + _BLOCK),)
    target[block] = source[block]
