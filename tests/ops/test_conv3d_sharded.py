"""Convolution on a mesh equals that on one device, whatever is split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import sharding
from dcvideogen_jax.ops import conv3d


def _value_and_gradients(function, padding, implementation):
  def total(x, kernel, bias):
    y = function(
      x, kernel, bias, padding=padding, implementation=implementation
    )
    return jnp.sum(y * y), y

  return jax.value_and_grad(total, (0, 1, 2), has_aux=True)


# With more taps than rows and columns, XLA's own partitioner adds wrongly.
@pytest.mark.parametrize("implementation", ["xla", "outputs", "winograd"])
@pytest.mark.parametrize(
  ("axes", "clips", "sides"),
  [
    ({"fsdp": 2, "spatial": 2}, 4, (1, 1)),
    ({"spatial": 8}, 1, (1, 1)),
    ({"spatial": 4}, 1, (2, 0)),
    ({"data": 2, "context": 2, "spatial": 2}, 3, (0, 2)),
    ({"tensor": 2, "data": 2}, 2, (1, 1)),
  ],
)
def test_any_mesh(axes, clips, sides, implementation):
  rng = np.random.default_rng(0)
  sizes = ((clips, 3, 2, 8, 4), (3, 3, 3, 4, 6), (6,))
  given = [rng.normal(size=size).astype(np.float32) for size in sizes]
  padding = ((0, 1), (1, 1), sides)
  expected = _value_and_gradients(conv3d.conv3d, padding, implementation)
  expected = jax.jit(expected)(*given)

  count = int(np.prod(list(axes.values())))
  mesh = sharding.make_mesh(axes, jax.devices()[:count])
  specs = (P(), P(None, None, None, "fsdp"), P("fsdp"))
  where = tuple(NamedSharding(mesh, spec) for spec in specs)
  function = _value_and_gradients(
    conv3d.conv3d_sharded, padding, implementation
  )
  with jax.set_mesh(mesh):
    program = jax.jit(function, in_shardings=where).lower(*given).compile()
    found = program(*jax.device_put(given, list(where)))
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
  sent = re.findall(r" collective-permute(?:-start)?\(", program.as_text())
  columns = sharding.num_shards(mesh, "columns")
  assert bool(sent) == (columns > 1)


def test_columns_that_the_devices_do_not_divide_are_refused():
  mesh = sharding.make_mesh({"spatial": 8})
  x, kernel = jnp.zeros((1, 1, 3, 12, 2)), jnp.zeros((1, 1, 3, 2, 2))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="divisible"):
    conv3d.conv3d_sharded(x, kernel, padding=((0, 0), (0, 0), (1, 1)))


def test_columns_of_more_than_the_next_device_are_refused():
  mesh = sharding.make_mesh({"spatial": 8}, jax.devices())
  x, kernel = jnp.ones((1, 3, 2, 8, 4)), jnp.ones((3, 3, 3, 4, 6))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="1 columns.*2, 0"):
    conv3d.conv3d_sharded(x, kernel, padding=((0, 1), (1, 1), (2, 0)))
