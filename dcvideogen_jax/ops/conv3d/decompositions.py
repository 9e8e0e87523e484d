"""conv3d as cheaper operations, for backends whose own form is slow."""

import functools
import operator

import jax.numpy as jnp
from jax import lax


def _pad_frames(x, padding):
  return lax.pad(
    x, jnp.zeros((), x.dtype), [(0, 0, 0), (*padding, 0)] + [(0, 0, 0)] * 3
  )


def frames(x, kernel, padding, precision):
  """One 2-D convolution per temporal tap, frames folded into the batch."""
  n, _, h, w, c = x.shape
  taps = kernel.shape[0]
  x = _pad_frames(x.astype(jnp.float32), padding[0])
  t = x.shape[1] - taps + 1

  def tap(i):
    y = lax.conv_general_dilated(
      x[:, i : i + t].reshape(n * t, h, w, c),
      kernel[i].astype(jnp.float32),
      window_strides=(1, 1),
      padding=padding[1:],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision,
    )
    return y.reshape(n, t, *y.shape[1:])

  return functools.reduce(operator.add, map(tap, range(taps)))
