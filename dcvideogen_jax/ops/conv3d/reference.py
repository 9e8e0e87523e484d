"""The definition of conv3d, and XLA's own form of it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array


def xla(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  padding: Sequence[tuple[int, int]],
  precision: lax.PrecisionLike,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Calls XLA's convolution in the dtype of `x`.

  cuDNN and the TPU's matrix unit accumulate products of bfloat16 in float32.

  Args:
    x, kernel, padding, precision: as for `api.conv3d`.
  """
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1, 1),
    padding=padding,
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    precision=precision,
  )


def reference(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  padding: Sequence[tuple[int, int]],
  precision: lax.PrecisionLike,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Calls `xla` in float32 (float64 for float64), whatever the dtype of `x`.

  Args:
    x, kernel, padding, precision: as for `api.conv3d`.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  y = xla(x.astype(wide), kernel.astype(wide), padding, precision)
  return y.astype(x.dtype)
