"""Runs a network over arrays in batches, split over devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax.arrays import Array


def devices_of(variables: Any) -> list[jax.Device]:
  """Returns the devices that hold the variables; for numpy the default."""
  leaf = jax.tree.leaves(variables)[0]
  if not isinstance(leaf, jax.Array):
    return jax.local_devices()[:1]
  return sorted(leaf.sharding.device_set, key=lambda device: device.id)


def replicated(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Copies the arrays of a tree to each of the devices."""
  return jax.device_put(tree, NamedSharding(_mesh(devices), P()))


def run(
  function: Callable[..., jax.Array],
  arrays: Sequence[Array],
  devices: Sequence[jax.Device],
  size: int,
) -> np.ndarray:
  """Applies a function to batches of the first axis and joins the results.

  Args:
    function: takes a batch of each array and returns an array with the same
      first axis, whose entries do not depend on each other.
    arrays: one or more with the same first axis, of one entry or more.
    devices: they share each batch.
    size: entries per device and batch. The last batch is filled up with copies
      of its last entry, and their results are dropped.
  """
  sharding = NamedSharding(_mesh(devices), P("data"))
  size *= len(devices)
  results = []
  for start in range(0, len(arrays[0]), size):
    parts = [np.asarray(x[start : start + size]) for x in arrays]
    real = len(parts[0])
    if real < size:
      copies = [1] * (real - 1) + [size - real + 1]
      parts = [np.repeat(x, copies, axis=0) for x in parts]
    results.append((function(*jax.device_put(parts, sharding)), real))
  return np.concatenate([np.asarray(x)[:real] for x, real in results])


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
  return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
