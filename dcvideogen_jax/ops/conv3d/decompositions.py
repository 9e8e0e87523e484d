"""conv3d as one 2-D convolution, with the frames folded into the batch.

On the CPU, XLA's 2-D convolution is several times faster than its 3-D one for
few channels. The temporal taps become channels of the input or of the output;
each of these two forms is the transpose of the other.

Both accumulate in float32 (float64 for float64).
"""

import functools
import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array


def fold_taps_into_input(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  padding: Sequence[tuple[int, int]],
  precision: lax.PrecisionLike,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Convolves with the shifted frames concatenated in the input's channels.

  Args:
    x, kernel, padding, precision: as for `api.conv3d`.
  """
  taps, kh, kw, _, o = kernel.shape
  x = _pad_frames(x, padding[0])
  t = x.shape[1] - taps + 1
  x = jnp.concatenate([x[:, i : i + t] for i in range(taps)], axis=-1)
  kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, -1, o)
  return _conv2d(x, kernel, padding[1:], precision).astype(x.dtype)


def fold_taps_into_output(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  padding: Sequence[tuple[int, int]],
  precision: lax.PrecisionLike,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Convolves with the taps in the output's channels, then sums them shifted.

  Args:
    x, kernel, padding, precision: as for `api.conv3d`.
  """
  taps, kh, kw, c, o = kernel.shape
  x = _pad_frames(x, padding[0])
  t = x.shape[1] - taps + 1
  kernel = kernel.transpose(1, 2, 3, 0, 4).reshape(kh, kw, c, -1)
  y = _conv2d(x, kernel, padding[1:], precision)
  parts = [y[:, i : i + t, ..., i * o : (i + 1) * o] for i in range(taps)]
  return functools.reduce(operator.add, parts).astype(x.dtype)


def _pad_frames(x, padding):
  none = (0, 0, 0)
  edges = (none, (*padding, 0), none, none, none)
  return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _conv2d(x, kernel, padding, precision):
  wide = jnp.promote_types(x.dtype, jnp.float32)
  y = lax.conv_general_dilated(
    x.reshape(-1, *x.shape[2:]).astype(wide),
    kernel.astype(wide),
    window_strides=(1, 1),
    padding=padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )
  return y.reshape(*x.shape[:2], *y.shape[1:])
