"""Rotary position embedding over frames, rows and columns.

Follows Wan 2.1 (`wan/modules/model.py`, commit 9737cba, `rope_params` and
`rope_apply`). Neighbouring channels of a head form `e // 2` pairs, which are
rotated by angles: first the pairs of the frame, then `e // 6` pairs of the row,
then `e // 6` pairs of the column.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dcvideogen_jax.arrays import Array

Angles = Float[Array, "n pairs"]

_BASE = 10000.0


def angles(
  positions: tuple[np.ndarray, np.ndarray, np.ndarray], head_width: int
) -> Angles:
  """Returns the angle of each pair of each token, in radians.

  Args:
    positions: positions of the frames, of the rows and of the columns.
    head_width: channels of a head, even.

  Returns:
    float32, tokens in t h w order.
  """
  pairs = head_width // 2
  small = head_width // 6
  grid = []
  for axis, (place, n) in enumerate(
    zip(positions, (pairs - 2 * small, small, small), strict=True)
  ):
    frequencies = _BASE ** -(np.arange(n) / n)
    table = np.outer(place, frequencies).astype(np.float32)
    shape = [1, 1, 1, n]
    shape[axis] = len(place)
    grid.append(jnp.asarray(table).reshape(shape))
  sizes = tuple(len(place) for place in positions)
  grid = [jnp.broadcast_to(g, (*sizes, g.shape[-1])) for g in grid]
  return jnp.concatenate(grid, axis=-1).reshape(-1, pairs)


def rotate(
  x: Float[Array, "b n k e"], angles: Angles
) -> Float[Array, "b n k e"]:
  """Rotates the pairs of each head by their angles, in float32."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  first, second = pairs[..., 0], pairs[..., 1]
  cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
  rotated = jnp.stack(
    [first * cos - second * sin, first * sin + second * cos], axis=-1
  )
  return rotated.reshape(x.shape).astype(x.dtype)
