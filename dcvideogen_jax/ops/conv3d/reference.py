"""The definition of conv3d that every other form is compared with."""

import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NDHWC", "DHWIO", "NDHWC")


def reference(x, kernel, padding, precision):
  """XLA's convolution of float32 copies, whatever the dtype of `x`."""
  y = lax.conv_general_dilated(
    x.astype(jnp.float32),
    kernel.astype(jnp.float32),
    window_strides=(1, 1, 1),
    padding=padding,
    dimension_numbers=DIMENSIONS,
    precision=precision,
  )
  return y.astype(x.dtype)


def xla(x, kernel, padding, precision):
  """XLA's convolution in the dtype of `x`.

  cuDNN and the TPU's matrix unit accumulate bfloat16 in float32.
  """
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1, 1),
    padding=padding,
    dimension_numbers=DIMENSIONS,
    precision=precision,
  )
