"""conv3d on all devices of a mesh, sharded over clips and columns.

Each device convolves its own shard, with the implementation that `conv3d`
chooses for its size. Before that, its neighbours send it the columns beside the
shard in two collective-permutes, which give zeros beyond the edges of the
picture. The result is therefore exact, and only weights are gathered, forward
and backward.

XLA partitions a convolution in nearly the same way if only `x` is constrained,
but with three drawbacks. First, it chooses among methods by size. If the kernel
is sharded over its input channels (FSDP) and larger than the picture, as around
the latents, the method of jaxlib 0.10.2 sums wrongly and the result is far off.
Second, it gathers the inputs of Winograd's tiles. Third, it knows the size of a
shard too late for the choice of bands by `max_elements`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.conv3d import api


def conv3d_sharded(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  padding: Sequence[tuple[int, int]],
  implementation: str | None = None,
) -> Float[Array, "n t2 h2 w o"]:
  """Computes `conv3d` on the mesh in force, or without a mesh.

  Args:
    x: `w` is a multiple of the devices that share the columns. The clips are
      sharded if `n` is a multiple of the devices that share a batch.
    kernel, bias, implementation: as for `conv3d`.
    padding: as for `conv3d`, but it keeps the number of columns, and a device
      has at least as many columns as are padded on a side.

  Raises:
    ValueError: as for `conv3d`, or if a device has too few columns.
    NotImplementedError: as for `conv3d`.
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
  """Adds `low` columns of the previous device and `high` of the next one."""
  count = lax.axis_size(axes)
  ahead = [(i, i + 1) for i in range(count - 1)]
  back = [(j, i) for i, j in ahead]
  before = lax.ppermute(x[:, :, :, x.shape[3] - low :], axes, ahead)
  after = lax.ppermute(x[:, :, :, :high], axes, back)
  return jnp.concatenate([before, x, after], axis=3)
