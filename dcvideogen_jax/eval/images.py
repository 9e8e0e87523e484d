"""PSNR, SSIM and MS-SSIM of frames, as the official evaluation defines them.

Follows DC-Gen `aecore/trainer.py` and `apps/metrics/psnr/psnr.py` (commit
cae2205): frames quantised to uint8, range 255, one value per frame, the mean
over frames reported. Its SSIM is torchmetrics' (1.2 and later): Gaussian window
of 11 by 11 with sigma 1.5, frames mirrored at the border, averaged over all
positions and channels. MS-SSIM, which the official code does not report, is
torchmetrics' too (1.9, `MultiScaleStructuralSimilarityIndexMeasure`): SSIM at
the smallest of five scales, and the contrast at the others without the border
of five pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array

_RANGE = 255.0
_RADIUS = 5
_SIGMA = 1.5
# Stabilisers of Wang et al. 2004, with K1 = 0.01 and K2 = 0.03.
_C1 = (0.01 * _RANGE) ** 2
_C2 = (0.03 * _RANGE) ** 2
# Exponents of the scales of Wang et al. 2003, from the largest, and the fewest
# pixels of a side that torchmetrics takes.
_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SHORTEST_SIDE = 176


def psnr(
  reference: UInt8[Array, "n h w c"], other: UInt8[Array, "n h w c"]
) -> Float64[np.ndarray, " n"]:
  """Peak signal-to-noise ratio of each frame in dB; infinite if equal.

  Raises:
    TypeError: if the frames are not uint8.
    ValueError: if the shapes differ or are not (n, h, w, c).
  """
  check(reference, other)
  difference = reference.astype(np.int32) - other
  mse = np.mean(np.square(difference), axis=(1, 2, 3), dtype=np.float64)
  with np.errstate(divide="ignore"):
    return 10 * np.log10(_RANGE**2 / mse)


def ssim(
  reference: UInt8[Array, "n h w c"], other: UInt8[Array, "n h w c"]
) -> Float64[np.ndarray, " n"]:
  """Structural similarity of each frame, 1 if equal; computed by jax.

  Raises:
    TypeError: if the frames are not uint8.
    ValueError: if the shapes differ or are not (n, h, w, c).
  """
  check(reference, other)
  # Frame by frame, so that one compiled program serves any number of frames.
  values = [_ssim(*pair) for pair in zip(reference, other, strict=True)]
  # Rounding can push the SSIM of equal frames above 1.
  return np.minimum(np.asarray(jax.device_get(values), np.float64), 1.0)


def ms_ssim(
  reference: UInt8[Array, "n h w c"], other: UInt8[Array, "n h w c"]
) -> Float64[np.ndarray, " n"]:
  """Structural similarity over five scales of each frame, 1 if equal.

  Raises:
    TypeError: if the frames are not uint8.
    ValueError: if the shapes differ or are not (n, h, w, c).
    errors.UserError: if a side has fewer than 176 pixels.
  """
  check(reference, other)
  height, width = reference.shape[1:3]
  if min(height, width) < SHORTEST_SIDE:
    raise errors.UserError(
      f"MS-SSIM needs frames of at least {SHORTEST_SIDE} pixels on each side,"
      f" found {height}x{width}"
    )
  values = [_ms_ssim(*pair) for pair in zip(reference, other, strict=True)]
  return np.minimum(np.asarray(jax.device_get(values), np.float64), 1.0)


def check(reference: Array, other: Array) -> None:
  """Checks that frames can be compared.

  Raises:
    TypeError: if the frames are not uint8.
    ValueError: if the shapes differ or are not (n, h, w, c).
  """
  for frames in (reference, other):
    if frames.dtype != np.uint8:
      raise TypeError(f"frames must be uint8, not {frames.dtype}")
  if reference.shape != other.shape or reference.ndim != 4:
    raise ValueError(
      "frames must have equal shapes (n, h, w, c), not "
      f"{reference.shape} and {other.shape}"
    )


@jax.jit
def _ssim(x: UInt8[Array, "h w c"], y: UInt8[Array, "h w c"]):
  luminance, contrast = _maps(x.astype(jnp.float32), y.astype(jnp.float32))
  return jnp.mean(luminance * contrast)


@jax.jit
def _ms_ssim(x: UInt8[Array, "h w c"], y: UInt8[Array, "h w c"]):
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  inside = slice(_RADIUS, -_RADIUS)
  product = jnp.float32(1)
  for scale, exponent in enumerate(_EXPONENTS, start=1):
    luminance, contrast = _maps(x, y)
    if scale < len(_EXPONENTS):
      value = jnp.mean(contrast[inside, inside])
      x, y = _halve(x), _halve(y)
    else:
      value = jnp.mean(luminance * contrast)
    # A negative similarity has no power.
    product *= jnp.maximum(value, 0) ** exponent
  return product


def _halve(x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
  """Averages squares of four pixels; an odd last row or column is left out."""
  h, w, c = x.shape
  x = x[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2, c)
  return jnp.mean(x, axis=(1, 3))


def _maps(x: Float[Array, "h w c"], y: Float[Array, "h w c"]):
  """Returns the maps of luminance, and of contrast and structure together."""
  mean_x, mean_y, xx, yy, xy = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
  # Rounding can push the variance of a flat patch below zero.
  variance_x = jnp.maximum(xx - mean_x**2, 0)
  variance_y = jnp.maximum(yy - mean_y**2, 0)
  covariance = xy - mean_x * mean_y
  luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
  structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
  return luminance, structure


def _blur(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  for axis in (1, 2):
    padding = [(0, 0)] * 4
    padding[axis] = (_RADIUS, _RADIUS)
    padded = jnp.pad(x, padding, mode="reflect")
    slices = (
      jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
      for i in range(2 * _RADIUS + 1)
    )
    x = functools.reduce(
      jnp.add, (w * s for w, s in zip(_window(), slices, strict=True))
    )
  return x


def _window() -> list[float]:
  offsets = np.arange(-_RADIUS, _RADIUS + 1)
  weights = np.exp(-0.5 * np.square(offsets / _SIGMA))
  return (weights / weights.sum()).tolist()
