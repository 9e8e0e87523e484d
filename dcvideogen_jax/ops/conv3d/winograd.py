"""conv3d by Winograd's minimal filtering F(2, 3) along t, h and w.

Tiles of 4x4x4 inputs give 2x2x2 outputs from 64 products instead of 216 (Lavin
and Gray, arXiv 1509.09308, with one more axis). Each product is a matrix
product over the channels. The sums before and after the products are nested
loops, one per axis, so that the graph stays small, and little more than two
rows of tiles is held at a time.

The rounding error in float32 is about twice that of the direct form.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array

# Along one axis, product i takes the inputs FIRST[i] + SIGN[i] * SECOND[i] of a
# tile, and the kernel's taps combined by KERNEL[i].
FIRST = np.array([0, 1, 2, 1])
SECOND = np.array([2, 2, 1, 3])
SIGN = np.array([-1, 1, -1, -1])
KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2

# Rows of a matrix product. With fewer rows the CPU's cores are not kept busy,
# with more rows the operands do not fit into the cache.
POSITIONS = 1024


def refusals(kernel: Sequence[int]) -> list[str]:
  """Returns the reasons why `winograd` does not support a kernel shape."""
  if tuple(kernel[:3]) != (3, 3, 3):
    return [f"the kernel must be 3x3x3, found {tuple(kernel[:3])}"]
  return []


# With jit, the function is traced once per shape and not once per layer.
@functools.partial(jax.jit, static_argnums=(2, 3))
def winograd(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  padding: Sequence[tuple[int, int]],
  precision: lax.PrecisionLike,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Convolves one band of rows after the other.

  Args:
    x, kernel, padding, precision: as for `api.conv3d`.
  """
  (n, *_), (*_, c, o) = x.shape, kernel.shape
  wide = jnp.promote_types(x.dtype, jnp.float32)
  size = [s + sum(p) - 2 for s, p in zip(x.shape[1:4], padding, strict=True)]
  tt, th, tw = (-(-s // 2) for s in size)
  bands = -(-th // max(1, POSITIONS // (n * tt * tw)))
  rows = -(-th // bands)
  th = bands * rows

  zero = _zero(x).astype(wide)
  x = _tiles(x, padding, (tt, th, tw))
  kernel = kernel.astype(wide)
  if bands > 1:
    # The taps are combined once for all bands. For one band, `_filter` combines
    # them.
    taps = np.kron(np.kron(KERNEL, KERNEL), KERNEL)
    combine = jnp.asarray(taps, wide) + zero
    kernel = jnp.dot(combine, kernel.reshape(27, -1), precision=precision)
    kernel = kernel.reshape(4, 4, 4, c, o)

  def band(i, y):
    part = lax.dynamic_slice_in_dim(x, i * rows, rows + 1, axis=3)
    part = _filter(part.astype(wide), kernel, 1, precision)
    part = part.reshape(n, 2 * tt, 2 * rows, 2 * tw, o).astype(y.dtype)
    return lax.dynamic_update_slice_in_dim(y, part, i * 2 * rows, axis=2)

  y = jnp.full((n, 2 * tt, 2 * th, 2 * tw, o), zero, x.dtype)
  y = lax.fori_loop(0, bands, band, y)
  return y[:, : size[0], : size[1], : size[2]]


def _zero(x):
  """Returns a 0 that is computed from `x`.

  On the CPU, XLA runs an operation as soon as its operands are there. If the
  buffers and the transformed kernels did not depend on `x`, those of all layers
  would be in memory at once.
  """
  bits = lax.bitcast_convert_type(x[0, 0, 0, 0, 0], f"uint{8 * x.itemsize}")
  return (bits & 1) >> 1


def _tiles(x, padding, tiles):
  """Pads to whole tiles and splits t, h and w into (pair, parity)."""
  edges = [
    (low, 2 * count + 2 - size - low, 0)
    for size, (low, _), count in zip(x.shape[1:4], padding, tiles, strict=True)
  ]
  none = (0, 0, 0)
  x = lax.pad(x, jnp.zeros((), x.dtype), (none, *edges, none))
  pairs = [side for count in tiles for side in (count + 1, 2)]
  return x.reshape(x.shape[0], *pairs, x.shape[-1])


def _filter(x, kernel, axis, precision):
  """Filters `axis` and the axes after it, then multiplies the channels.

  Each axis of `x` is split into (pair, parity). Filtering an axis turns its
  pairs into tiles, which are one fewer, and its parities into those of the
  output. `kernel` has 3 taps on each axis, or 4 if they are combined already.
  """
  if kernel.ndim == 2:
    return jnp.dot(x, kernel, precision=precision)
  combined = len(kernel) == len(KERNEL)

  def product(_, args):
    first, second, sign, taps = args
    part = _take(x, axis, first) + sign * _take(x, axis, second)
    if not combined:
      taps = jnp.tensordot(taps, kernel, 1, precision=precision)
    return None, _filter(part, taps, axis + 1, precision)

  taps = kernel if combined else jnp.asarray(KERNEL, kernel.dtype)
  which = (jnp.asarray(FIRST), jnp.asarray(SECOND), jnp.asarray(SIGN, x.dtype))
  _, m = lax.scan(product, None, (*which, taps))
  return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis=axis + 1)


def _take(x, axis, i):
  """Returns input `i` of every tile along `axis`."""
  x = lax.dynamic_index_in_dim(x, i % 2, axis + 1, keepdims=False)
  return lax.dynamic_slice_in_dim(x, i // 2, x.shape[axis] - 1, axis)
