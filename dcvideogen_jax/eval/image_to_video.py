"""How well a video keeps the image that it starts from, and its colours.

The definitions are this library's own: PSNR, SSIM and LPIPS of the first frame
against the image, and the shift of the mean colour of each frame in CIELAB
(D65, from sRGB). A change of 1 is just visible between two patches side by
side. Motion and cuts change the mean colour too, so compare models on the same
images, or with real clips.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, UInt8

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.eval import images

# Linear sRGB to XYZ, and the white of D65, IEC 61966-2-1.
_XYZ = (
  (0.4124564, 0.3575761, 0.1804375),
  (0.2126729, 0.7151522, 0.0721750),
  (0.0193339, 0.1191920, 0.9503041),
)
_DELTA = 6 / 29


def first_frame(
  image: UInt8[Array, "h w 3"],
  video: UInt8[Array, "t h w 3"],
  lpips: Callable[[Array, Array], Float64[np.ndarray, " n"]] | None = None,
) -> dict[str, float]:
  """Compares the first frame of a video with the image that it starts from.

  Args:
    image: the image as the model got it, in the size of the video.
    video: the frames.
    lpips: `lpips.distance` with its first two arguments; None leaves it out.

  Returns:
    "psnr" in dB, infinite if equal; "ssim"; and "lpips" if it is given.

  Raises:
    TypeError: if the image or the frames are not uint8.
    ValueError: if the sizes differ.
  """
  pair = image[None], video[:1]
  found = {
    "psnr": float(images.psnr(*pair)[0]),
    "ssim": float(images.ssim(*pair)[0]),
  }
  if lpips is not None:
    found["lpips"] = float(lpips(*pair)[0])
  return found


def colour_drift(
  video: UInt8[Array, "t h w 3"], image: UInt8[Array, "h w 3"] | None = None
) -> Float64[np.ndarray, "t 3"]:
  """Returns the mean L, a and b of each frame, minus those of the image.

  L is lightness from 0 to 100; a goes from green to red, b from blue to yellow.

  Args:
    video: the frames.
    image: what the colours should stay at; None for the first frame.
  """
  image = video[0] if image is None else image
  means = jax.device_get([_mean_colour(frame) for frame in (image, *video)])
  means = np.asarray(means, np.float64)
  return means[1:] - means[:1]


def drift(
  video: UInt8[Array, "t h w 3"], image: UInt8[Array, "h w 3"] | None = None
) -> Float64[np.ndarray, " t"]:
  """Returns the size of `colour_drift` of each frame: Delta E of 1976.

  Args:
    video: the frames.
    image: what the colours should stay at; None for the first frame.
  """
  return np.linalg.norm(colour_drift(video, image), axis=-1)


@jax.jit
def _mean_colour(frame: UInt8[Array, "h w 3"]) -> Float[Array, "3"]:
  return jnp.mean(_lab(frame), axis=(0, 1))


def _lab(frame: UInt8[Array, "h w 3"]) -> Float[Array, "h w 3"]:
  x = frame.astype(jnp.float32) / 255
  linear = jnp.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
  matrix = np.asarray(_XYZ)
  # Rows are scaled so that white is 1, 1, 1.
  matrix = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
  xyz = jnp.matmul(linear, matrix.T, precision="highest")
  f = jnp.where(xyz > _DELTA**3, jnp.cbrt(xyz), xyz / (3 * _DELTA**2) + 4 / 29)
  x, y, z = f[..., 0], f[..., 1], f[..., 2]
  return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
