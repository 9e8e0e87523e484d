"""conv3d on all devices of a mesh, split over clips and columns.

Each device convolves its own part, with whatever `conv3d` takes for one of that
size, after its neighbours have sent it the columns beside it: two
collective-permutes, which leave zeros where nobody sends, beyond the edges of
the picture. So the result is exact and nothing but weights is ever gathered,
forward and backward.

XLA derives much the same from constraints on `x` alone. But it chooses among
several ways by size, and where the kernel is split over its inputs (FSDP) and
larger than the picture, as around latents, that of jaxlib 0.10.2 adds wrongly
and the result is far off; it gathers what Winograd's tiles see; and it knows
the size of a device's part only after `max_elements` was needed.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dcvideogen_jax import sharding
from dcvideogen_jax.ops.conv3d import api


def conv3d_sharded(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  padding: Sequence[tuple[int, int]],
  implementation: str | None = None,
) -> Float[Array, "n t2 h2 w o"]:
  """`conv3d` on the mesh in force; without one it is just that.

  Args:
    x: `w` is a multiple of the devices that share the columns; `n` is split
      if it is one of those that share a batch.
    kernel, bias, implementation: as `conv3d` takes them.
    padding: likewise, with as many columns as keep `w`; a device must have that
      many itself.

  Raises:
    ValueError: as `conv3d`, or if a device has too few columns.
    NotImplementedError: as `conv3d`.
  """
  local = functools.partial(api.conv3d, implementation=implementation)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(x, kernel, bias, padding=padding)
  clips = None if x.shape[0] % sharding.num_shards(mesh, "batch") else "batch"
  where = sharding.activation_spec(mesh, clips, None, None, "columns")
  axes = where[3]
  columns = x.shape[3] // sharding.num_shards(mesh, "columns")
  if columns < max(padding[2]):
    raise ValueError(
      f"{columns} columns on a device are fewer than the padding {padding[2]}"
    )

  def part(x, kernel, bias):
    if sharding.num_shards(mesh, "columns") == 1:
      return local(x, kernel, bias, padding=padding)
    x = _with_neighbours(x, *padding[2], axes)
    return local(x, kernel, bias, padding=(*padding[:2], (0, 0)))

  return jax.shard_map(part, in_specs=(where, P(), P()), out_specs=where)(
    x, kernel, bias
  )


def _with_neighbours(x, low, high, axes):
  """Adds the last `low` columns of the device before and so on."""
  count = lax.axis_size(axes)
  ahead = [(i, i + 1) for i in range(count - 1)]
  back = [(j, i) for i, j in ahead]
  before = lax.ppermute(x[:, :, :, x.shape[3] - low :], axes, ahead)
  after = lax.ppermute(x[:, :, :, :high], axes, back)
  return jnp.concatenate([before, x, after], axis=3)
