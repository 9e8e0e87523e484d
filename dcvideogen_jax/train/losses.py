"""Losses and measures of reconstruction, on float32 video in [-1, 1].

Every term is a mean, over all samples and all numbers of a sample, unless its
docstring says otherwise. So its weight does not depend on the size of clips.
Code that sums the pixels of a frame needs other weights: 256x256 pixels make
such an L1 some 200 000 times as large.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array

Video = Float[Array, "b t h w c"]
Smaller = Float[Array, "b t h2 w2 c"]
Scalar = Float[Array, ""]


def l1(x: Video, y: Video) -> Scalar:
  """Returns the mean absolute difference."""
  return jnp.abs(x - y).mean()


def mse(x: Video, y: Video) -> Scalar:
  """Returns the mean squared difference."""
  return jnp.square(x - y).mean()


def gradient(x: Video, y: Video, scales: int = 3) -> Scalar:
  """Returns the L1 distance between differences along time, rows and columns.

  The term asks for edges and motion in the right place, to which plain L1 gives
  little weight.

  Args:
    x, y: the videos.
    scales: number of resolutions; each coarser one averages 2x2 pixels.
  """
  error, total = x - y, jnp.zeros((), jnp.float32)
  for scale in range(scales):
    if scale:
      error = _halve(error)
    for axis in (1, 2, 3):
      if error.shape[axis] > 1:
        total += jnp.abs(jnp.diff(error, axis=axis)).mean()
  return total / scales


def wavelet(x: Video, y: Video) -> Scalar:
  """Returns the L1 distance of the coefficients of one 3-D Haar transform.

  The mean is over the coefficients of all eight sub-bands. The transform along
  frames, rows and columns is orthonormal: noise counts as in `l1`, a constant
  difference sqrt(1 / 8) times as much. An axis of odd length loses its last
  element, an axis of length 1 is not transformed.
  """
  error = x - y
  for axis in (1, 2, 3):
    pairs = error.shape[axis] // 2
    if not pairs:
      continue
    shape = (*error.shape[:axis], pairs, 2, *error.shape[axis + 1 :])
    error = jax.lax.slice_in_dim(error, 0, 2 * pairs, axis=axis).reshape(shape)
    even, odd = (error.take(i, axis=axis + 1) for i in (0, 1))
    error = jnp.concatenate([even + odd, even - odd], axis) / math.sqrt(2)
  return jnp.abs(error).mean()


def dssim(x: Video, y: Video, window: int = 7) -> Scalar:
  """Returns the structural dissimilarity (1 - SSIM) / 2.

  Args:
    x, y, window: as for `ssim`.
  """
  return (1 - ssim(x, y, window)) / 2


def ssim(x: Video, y: Video, window: int = 7) -> Scalar:
  """Returns the mean structural similarity (SSIM) with a uniform window.

  It is a cheap relative of the official SSIM with a Gaussian window, for
  training and validation curves. Compare published numbers with
  `eval.images.ssim`.

  Args:
    x, y: the videos, in [-1, 1].
    window: its side in pixels; frames must be at least as large.
  """
  c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
  mx, my = _blur(x, window), _blur(y, window)
  vx = _blur(x * x, window) - mx * mx
  vy = _blur(y * y, window) - my * my
  vxy = _blur(x * y, window) - mx * my
  top = (2 * mx * my + c1) * (2 * vxy + c2)
  return (top / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def psnr(x: Video, y: Video) -> Float[Array, " b"]:
  """Returns the peak signal-to-noise ratio of each clip in dB, with peak 2."""
  error = jnp.square(x - y).mean(axis=(1, 2, 3, 4))
  return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def kl(mean: Video, logvar: Video) -> Scalar:
  """Returns the mean KL divergence of N(mean, exp(logvar)) from N(0, 1).

  The mean is over samples and all numbers of the latents.
  """
  return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()


def _halve(x: Video) -> Smaller:
  b, t, h, w, c = x.shape
  x = x[:, :, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, t, h // 2, 2, w // 2, 2, c).mean((3, 5))


def _blur(x: Video, window: int) -> Smaller:
  """Averages each window x window patch that lies inside the frame."""
  for axis in (2, 3):
    total = jnp.cumsum(x, axis=axis)
    zero = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
    total = jnp.concatenate([zero, total], axis=axis)
    n = total.shape[axis]
    upper = jax.lax.slice_in_dim(total, window, n, axis=axis)
    lower = jax.lax.slice_in_dim(total, 0, n - window, axis=axis)
    x = (upper - lower) / window
  return x


TERMS = {
  "l1": l1,
  "mse": mse,
  "gradient": gradient,
  "dssim": dssim,
  "wavelet": wavelet,
}


def weighted(
  x: Video, y: Video, weights: Mapping[str, float]
) -> tuple[Scalar, dict[str, Scalar]]:
  """Returns the weighted sum of terms of `TERMS`, and each term by name.

  Args:
    x, y: the videos, in any floating dtype; terms are computed in float32.
    weights: by the name of the term. A term of weight 0 is not computed and
      need not exist.

  Raises:
    errors.UserError: for an unknown term, or when no term has a weight.
  """
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  terms = {
    name: errors.choose("a term of the loss", name, TERMS)(x, y)
    for name, weight in weights.items()
    if weight
  }
  if not terms:
    raise errors.UserError(
      f"at least one of the loss terms {', '.join(TERMS)} needs a weight"
    )
  return sum(weights[name] * value for name, value in terms.items()), terms
