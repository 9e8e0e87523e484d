"""Clips from photographs, by a camera that moves over them."""

import math

import numpy as np
import PIL.Image


def ken_burns(
  image: np.ndarray, seed: int, frames: int, height: int, width: int
) -> np.ndarray:
  """Pans, zooms and rotates over a photograph, with a little camera shake.

  Args:
    image: uint8 (h, w, 3), no smaller than (height, width).
    seed: non-negative; the same seed gives the same motion.
    frames: number of frames.
    height: pixels of the clip.
    width: pixels of the clip.

  Returns:
    uint8 (frames, height, width, 3).

  Raises:
    ValueError: if the image is smaller than the clip.
  """
  if image.shape[0] < height or image.shape[1] < width:
    raise ValueError(f"{image.shape[:2]} is smaller than {(height, width)}")
  rng = np.random.default_rng(seed)
  angles, scales, centres = _camera(rng, image.shape, frames, height, width)
  # Blocks are averaged first, so that fine texture does not alias.
  block = max(1, int(scales.min()))
  picture = PIL.Image.fromarray(image)
  # In float32, since Pillow truncates in 8 bits instead of rounding.
  bands = [band.convert("F").reduce(block) for band in picture.split()]
  clip = np.empty((frames, height, width, 3), np.uint8)
  for i in range(frames):
    c = scales[i] * math.cos(angles[i])
    s = scales[i] * math.sin(angles[i])
    y, x = centres[i] + 0.5
    # The affine map from pixels of the frame to pixels of the photograph.
    across = (c, -s, x - c * width / 2 + s * height / 2)
    down = (s, c, y - s * width / 2 - c * height / 2)
    for channel, band in enumerate(bands):
      moved = band.transform(
        (width, height),
        PIL.Image.Transform.AFFINE,
        [n / block for n in (*across, *down)],
        PIL.Image.Resampling.BILINEAR,
      )
      clip[i, ..., channel] = np.rint(moved)
  return clip


def _camera(rng, shape, frames, height, width):
  """Draws a camera path.

  Returns:
    For each frame the angle in radians, the scale (pixels of the photograph per
    pixel of the frame), and the centre (y, x) in pixels of the photograph.
  """
  progress = np.linspace(0, 1, frames)
  turn = rng.choice((0.0, 1.0)) * rng.normal(0, 0.15, 2)
  angle = turn[0] + (turn[1] - turn[0]) * progress
  c, s = np.abs(np.cos(angle)), np.abs(np.sin(angle))
  half_y, half_x = (c * height + s * width) / 2, (c * width + s * height) / 2
  most = min(
    (shape[0] - 1) / 2 / half_y.max(), (shape[1] - 1) / 2 / half_x.max()
  )
  least = min(0.75, most)
  ends = np.exp(rng.uniform(math.log(least), math.log(most), 2))
  # Zooms are limited to a factor of 1.35 per clip; faster ones look unnatural.
  ends[1] = np.clip(ends[1], ends[0] / 1.35, min(ends[0] * 1.35, most))
  scale = ends[0] * (ends[1] / ends[0]) ** progress
  shake = rng.choice((0.0, 1.0)) * rng.uniform(0, 0.01)
  centre = []
  for half, extent in ((half_y, shape[0]), (half_x, shape[1])):
    reach = half * scale
    room = extent - 1 - 2 * reach
    speed = rng.normal(0, 0.012) * 2 * reach.mean()
    way = rng.uniform(0, 1) * room[0] + speed * np.arange(frames)
    way = way + shake * 2 * reach * np.cumsum(rng.normal(0, 0.5, frames))
    centre.append(reach + np.clip(way, 0, np.maximum(room, 0)))
  return angle, scale, np.stack(centre, 1)
