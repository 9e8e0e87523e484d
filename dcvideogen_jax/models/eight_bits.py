"""Kernels in eight bits: int8 or float8, with a scale per output channel.

A kernel (in, out) is stored as numbers of one byte, `stored`, and a float32
`scale` (out,): kernel = stored * scale. The scale maps the largest magnitude of
a channel to the largest number of the format. This is the form of LightX2V's
int8 and fp8 files (one scale per output row of a torch weight), and of
vLLM's fp8 weights.

Products read the stored numbers: they are converted to the dtype of the inputs
within the product, which is exact for both formats, and the scale multiplies
the result. So no half-precision copy of the kernels is kept, and the only error
is that of rounding the kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import precision

# Name of a format -> dtype of the stored numbers. float8 has 4 bits of exponent
# and 3 of mantissa, and no infinity.
FORMATS: dict[str, Any] = {
  "int8": np.dtype(np.int8),
  "float8": np.dtype(ml_dtypes.float8_e4m3fn),
}
# The largest number of each format; int8 is used symmetrically.
_LARGEST = {"int8": 127.0, "float8": 448.0}


def is_stored(dtype: DTypeLike) -> bool:
  """Whether a kernel of this dtype is in eight bits."""
  return np.dtype(dtype) in FORMATS.values()


def format_of(dtype: DTypeLike) -> str:
  """Returns the name of the format whose numbers have this dtype."""
  return {v: k for k, v in FORMATS.items()}[np.dtype(dtype)]


def quantise(kernel: Any, name: str, axis: int = 0) -> tuple[Any, Any]:
  """Rounds a kernel to eight bits.

  Args:
    kernel: any floats, an array of numpy or of jax; computed in float32.
    name: a key of `FORMATS`.
    axis: the axis of input channels, over which a scale is shared.

  Returns:
    The stored numbers, in the kernel's shape, and the float32 scales, without
    `axis`. A channel of zeros has the scale 1. Numbers halfway between two are
    rounded to the even one.
  """
  xp = np if isinstance(kernel, np.ndarray) else jnp
  kernel = xp.asarray(kernel, xp.float32)
  largest = xp.max(xp.abs(kernel), axis=axis, keepdims=True)
  # XLA divides by a constant by multiplying, which rounds differently.
  scale = largest * np.float32(1 / _LARGEST[name])
  # A scale below the normal numbers would not map the largest onto the range.
  tiny = np.finfo(np.float32).tiny
  scale = xp.where(scale < tiny, np.float32(1), scale)
  stored = kernel / scale
  if name == "int8":
    stored = xp.rint(stored)
  # The quotient may exceed the largest number by a rounding error.
  stored = xp.clip(stored, -_LARGEST[name], _LARGEST[name])
  return stored.astype(FORMATS[name]), xp.squeeze(scale, axis)


@jax.custom_vjp
def _matmul(x, stored):
  return precision.matmul(x, stored)


def _forward(x, stored):
  # Saving the stored numbers, and not their conversion, keeps the backward pass
  # free of a half-precision copy of the kernels.
  return _matmul(x, stored), stored


def _backward(stored, dy):
  return precision.matmul(dy, stored.T), None


_matmul.defvjp(_forward, _backward)


def linear(
  x: Float[Array, "*n c"],
  stored: Any,
  scale: Float[Array, " f"],
  bias: Float[Array, " f"] | None = None,
) -> Float[Array, "*n f"]:
  """Computes x @ (stored * scale) + bias in the dtype of `x`.

  Kernel and scale are frozen: their gradients are zero.

  Args:
    x: channels last.
    stored: (c, f), in a dtype of `FORMATS`.
    scale: of each output channel, float32.
    bias: added in float32; None for none.
  """
  scale = jax.lax.stop_gradient(scale)
  axes = range(x.ndim - 1)
  y = _matmul(x, stored).astype(jnp.float32) * jnp.expand_dims(scale, axes)
  if bias is not None:
    y += jnp.expand_dims(bias.astype(jnp.float32), axes)
  return y.astype(x.dtype)
