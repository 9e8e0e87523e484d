"""Prepares images for CLIP's vision tower."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dcvideogen_jax import errors

# Mean and standard deviation of red, green and blue in [0, 1], over CLIP's
# training images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(
  image: UInt8[np.ndarray, "h w 3"], size: int = 224, *, stretch: bool = False
) -> Float[np.ndarray, "{size} {size} 3"]:
  """Resizes and normalises an image.

  The default is transformers' `CLIPImageProcessor`, which DC-Gen's
  `pipeline_dc_videogen.py` (commit cae2205) uses: the shorter side is resized
  to `size`, bicubic with antialiasing, rounded to whole levels, and the centre
  is cut out.

  Args:
    image: uint8 (h, w, 3), RGB, of any size.
    size: height and width of the result in pixels.
    stretch: whether to resize both sides to `size` instead, bicubic without
      antialiasing or rounding, as Wan 2.1 `wan/modules/clip.py` (commit
      9737cba) and DC-VideoGen's training do.

  Returns:
    float32 (size, size, 3).

  Raises:
    errors.UserError: if the image has another shape or dtype.
  """
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
    raise errors.UserError(
      f"expected an image uint8 (h, w, 3), found {image.dtype} {image.shape}"
    )
  if not image.size:
    raise errors.UserError(f"the image has no pixels: {image.shape}")
  if stretch:
    pixels = image.astype(np.float32) / np.float32(255)
    for axis in (0, 1):
      pixels = _bicubic(pixels, size, axis)
  else:
    height, width = image.shape[:2]
    short = min(height, width)
    # The longer side is truncated, not rounded, as in `CLIPImageProcessor`.
    height, width = (int(size * side / short) for side in (height, width))
    resized = Image.fromarray(image).resize(
      (width, height), Image.Resampling.BICUBIC
    )
    top, left = (height - size) // 2, (width - size) // 2
    cropped = np.asarray(resized)[top : top + size, left : left + size]
    pixels = (cropped * (1 / 255)).astype(np.float32)
  return (pixels - np.float32([[MEAN]])) / np.float32([[STD]])


def _bicubic(x: np.ndarray, size: int, axis: int) -> np.ndarray:
  """Resamples an axis of a float32 array as torch's bicubic interpolation.

  The kernel is Keys' with a = -0.75, over four samples at every scale. Samples
  outside the image repeat its edge.
  """
  length = x.shape[axis]
  scale = np.float32(length / size)
  place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale
  place -= np.float32(0.5)
  first = np.floor(place)
  t = place - first
  shape = [-1 if i == axis else 1 for i in range(x.ndim)]
  total = np.zeros((), np.float32)
  for tap, distance in ((-1, 1 + t), (0, t), (1, 1 - t), (2, 2 - t)):
    index = np.clip(first.astype(np.int64) + tap, 0, length - 1)
    weight = _keys(distance).astype(np.float32).reshape(shape)
    total = total + weight * np.take(x, index, axis)
  return total


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
  """Returns Keys' cubic convolution kernel at distances of 0 to 2 samples."""
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, far)
