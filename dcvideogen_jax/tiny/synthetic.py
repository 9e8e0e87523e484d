"""Procedurally generated motion: coloured shapes, and pans over photographs.

Pure numpy; the same seed gives the same clip.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

COLOURS = {
  "red": (222, 45, 38),
  "green": (49, 163, 84),
  "blue": (49, 104, 220),
  "yellow": (250, 210, 50),
  "orange": (245, 130, 32),
  "purple": (136, 65, 157),
  "pink": (247, 120, 180),
  "cyan": (60, 200, 210),
  "brown": (140, 86, 45),
  "white": (245, 245, 245),
  "grey": (128, 128, 128),
  "black": (18, 18, 18),
}


def _circle(x, y):
  return np.sqrt(x * x + y * y) - np.float32(1)


def _square(x, y):
  return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _polygon(x, y, sides, radius):
  """Distance to the nearest edge line of a regular polygon."""
  distance = y
  for i in range(1, sides):
    angle = 2 * math.pi * i / sides
    distance = np.maximum(
      distance,
      np.float32(math.sin(angle)) * x + np.float32(math.cos(angle)) * y,
    )
  return distance - np.float32(radius)


def _triangle(x, y):
  return _polygon(x, y, 3, 0.6)


def _hexagon(x, y):
  return _polygon(x, y, 6, 0.87)


def _star(x, y):
  """Five points, folded onto one edge by the star's mirror lines."""
  cosine, sine = (
    np.float32(math.cos(math.pi / 5)),
    np.float32(math.sin(math.pi / 5)),
  )
  x = np.abs(x)
  for kx in (cosine, -cosine):
    beyond = 2 * np.maximum(kx * x - sine * y, 0)
    x, y = x - beyond * kx, y + beyond * sine
  x, y = np.abs(x), y - 1
  edge_x, edge_y = 0.45 * sine, 0.45 * cosine - 1
  along = (x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)
  along = np.clip(along, 0, 1)
  outside = np.sign(y * edge_x - x * edge_y)
  x, y = x - edge_x * along, y - edge_y * along
  return np.sqrt(x * x + y * y) * outside


def _cross(x, y):
  x, y = np.abs(x), np.abs(y)
  return np.minimum(
    np.maximum(x - 0.95, y - 0.3), np.maximum(x - 0.3, y - 0.95)
  )


def _ring(x, y):
  return np.abs(np.sqrt(x * x + y * y) - np.float32(0.75)) - np.float32(0.22)


# Signed distance (negative inside) on coordinates in which a shape has about
# radius one.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "hexagon": _hexagon,
  "star": _star,
  "cross": _cross,
  "ring": _ring,
}


def clip(
  seed: int | Sequence[int], frames: int, height: int, width: int
) -> np.ndarray:
  """One to four shapes that move, turn and grow over a background.

  Edges are anti-aliased. Sizes and speeds are relative to the picture.

  Args:
    seed: non-negative; the same gives the same motion.
    frames: number of frames.
    height: pixels.
    width: pixels.

  Returns:
    uint8 (frames, height, width, 3).
  """
  rng = np.random.default_rng(seed)
  t = np.arange(frames, dtype=np.float32)[:, None, None]
  y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
  x = np.arange(width, dtype=np.float32) + np.float32(0.5)
  # Colour planes, since numpy is slow along an axis of three.
  planes = np.empty((3, frames, height, width), np.float32)
  planes[:] = _background(rng, t, y, x)
  for _ in range(rng.integers(1, 5)):
    _paint_shape(rng, planes, t, y, x)
  planes += np.float32(0.5)
  return np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 3, 0))


def _colour(rng: np.random.Generator) -> np.ndarray:
  """A named colour, slightly off, or any: float32 (3, 1, 1, 1), 0 to 255."""
  if rng.random() < 0.25:
    colour = rng.uniform(0, 255, 3)
  else:
    named = list(COLOURS.values())[rng.integers(len(COLOURS))]
    colour = np.clip(named + rng.normal(0, 8, 3), 0, 255)
  return colour.astype(np.float32)[:, None, None, None]


def _blend(mask: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """`one` where the mask (t, h, w) is 0, `other` where it is 1."""
  return one + mask * (other - one)


def _waves(rng, t, y, x, size, speed):
  """Stripes, a checkerboard or soft blobs in [0, 1] that may drift."""
  period = size * rng.uniform(0.08, 0.5)
  angle = rng.uniform(0, 2 * math.pi)
  c = np.float32(2 * math.pi / period * math.cos(angle))
  s = np.float32(2 * math.pi / period * math.sin(angle))
  drift, phase = rng.uniform(-speed, speed, 2) * 2 * math.pi / period, 7 * angle
  u = c * x + s * y + (np.float32(drift[0]) * t + np.float32(phase))
  kind = rng.integers(3)
  if kind == 0:
    wave = np.sin(u)
  else:
    v = c * y - s * x + np.float32(drift[1]) * t
    wave = np.sin(u) * np.sin(v)
    if kind == 2:
      wave = wave + np.sin(np.float32(0.37) * u - np.float32(0.61) * v)
  # Stripes and squares get edges about two pixels wide, blobs stay soft.
  steepness = np.float32(1.0 if kind == 2 else max(1.0, period / 6))
  return np.clip(0.5 + 0.5 * steepness * wave, 0, 1)


def _background(rng, t, y, x):
  """Flat, gradient or texture; broadcasts to (3, t, h, w)."""
  height, width = len(y), len(x)
  one, other = _colour(rng), _colour(rng)
  kind = rng.integers(4)
  if kind == 0:
    return one
  if kind == 1:
    angle = rng.uniform(0, 2 * math.pi)
    ramp = math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (
      y / height - 0.5
    )
    return _blend(np.clip(ramp + 0.5, 0, 1).astype(np.float32), one, other)
  size = min(height, width)
  # Half the textures stand still, which is cheaper: one frame for all.
  speed = 0.03 * size if kind == 3 else 0.0
  mask = _waves(rng, t if speed else t[:1], y, x, size, speed)
  return _blend(mask * np.float32(rng.uniform(0.3, 1)), one, other)


def _path(rng, frames: int, extent: float) -> np.ndarray:
  """One coordinate over time: straight with bounces, or a swing."""
  t = np.arange(frames)
  if rng.random() < 0.3:
    swing = np.sin(t * rng.uniform(0.05, 0.4) + rng.uniform(0, 2 * math.pi))
    return extent * (rng.uniform(0.3, 0.7) + rng.uniform(0.05, 0.35) * swing)
  speed = extent * rng.uniform(0.002, 0.06) * rng.choice((-1, 1))
  way = (rng.uniform(0, extent) + speed * t) % (2 * extent)
  return extent - np.abs(way - extent)


def _paint_shape(rng, planes, t, y, x) -> None:
  """Draws one moving shape over `planes` (3, t, h, w) in place."""
  _, frames, height, width = planes.shape
  size = min(height, width)
  radius = size * rng.uniform(0.06, 0.38)
  if rng.random() < 0.4:
    swell = np.sin(np.arange(frames) * rng.uniform(0.05, 0.3))
    radius = radius * (1 + rng.uniform(0.1, 0.5) * swell)
  radius = np.broadcast_to(radius, frames).astype(np.float32)[:, None, None]
  spin = rng.uniform(-0.15, 0.15) if rng.random() < 0.7 else 0.0
  angle = rng.uniform(0, 2 * math.pi) + spin * t
  cosine, sine = np.cos(angle) / radius, np.sin(angle) / radius
  middle = [
    _path(rng, frames, extent).astype(np.float32)[:, None, None]
    for extent in (height, width)
  ]
  kind, colour = rng.integers(len(SHAPES)), _colour(rng)
  rows = _reached(middle[0], radius, height)
  columns = _reached(middle[1], radius, width)
  dy, dx = y[rows] - middle[0], x[columns] - middle[1]
  u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
  alpha = np.clip(0.5 - list(SHAPES.values())[kind](u, v) * radius, 0, 1)
  if rng.random() < 0.3:
    still = np.zeros_like(t)
    colour = _blend(_waves(rng, still, v, u, 2.0, 0.0), colour, _colour(rng))
  region = planes[:, :, rows, columns]
  region += alpha * (colour - region)


def _reached(middle: np.ndarray, radius: np.ndarray, extent: int) -> slice:
  """The rows or columns that a shape touches in any frame."""
  # No shape reaches further than 1.25 radii (the corners of the square).
  low = float((middle - 1.25 * radius).min()) - 1
  high = float((middle + 1.25 * radius).max()) + 1
  return slice(max(0, math.floor(low)), min(extent, math.ceil(high)))


def ken_burns(
  image: np.ndarray, seed: int, frames: int, height: int, width: int
) -> np.ndarray:
  """Pans, zooms and turns over a photograph, with a little hand shake.

  Args:
    image: uint8 (h, w, 3), no smaller than (height, width).
    seed: any non-negative integer; the same seed gives the same motion.
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
  y, x = _camera(rng, image.shape, frames, height, width)
  # Averaging blocks first keeps fine texture from aliasing.
  step = np.hypot(y[:, 1, 0] - y[:, 0, 0], x[:, 1, 0] - x[:, 0, 0]).min()
  top, left = int(y.min()), int(x.min())
  image = image[top : int(y.max()) + 2, left : int(x.max()) + 2]
  y, x = y - top, x - left
  k = max(1, int(step))
  if k > 1:
    rows, columns = image.shape[0] // k, image.shape[1] // k
    image = image[: rows * k, : columns * k].reshape(rows, k, columns, k, 3)
    image = image.mean((1, 3), dtype=np.float32)
    y, x = (y + 0.5) / k - 0.5, (x + 0.5) / k - 0.5
  return _bilinear(image, y, x)


def _camera(rng, shape, frames, height, width):
  """Pixel coordinates (y, x) in the image, each float32 (t, h, w)."""
  progress = np.linspace(0, 1, frames, dtype=np.float32)
  turn = rng.choice((0.0, 1.0)) * rng.normal(0, 0.15, 2)
  angle = turn[0] + (turn[1] - turn[0]) * progress
  c, s = np.cos(angle), np.sin(angle)
  half_y = (np.abs(c) * height + np.abs(s) * width) / 2
  half_x = (np.abs(c) * width + np.abs(s) * height) / 2
  most = min(
    (shape[0] - 1) / 2 / half_y.max(), (shape[1] - 1) / 2 / half_x.max()
  )
  least = min(0.75, most)
  ends = np.exp(rng.uniform(math.log(least), math.log(most), 2))
  # Zooms of at most a third per clip; anything faster looks unlike video.
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
  dy = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None]
  dx = np.arange(width, dtype=np.float32) - (width - 1) / 2
  c, s = (np.asarray(a * scale, np.float32)[:, None, None] for a in (c, s))
  centre_y, centre_x = (a.astype(np.float32)[:, None, None] for a in centre)
  y = np.clip(centre_y + c * dy + s * dx, 0, shape[0] - 1)
  return y, np.clip(centre_x + c * dx - s * dy, 0, shape[1] - 1)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Samples (h, w, 3) at float coordinates of any one shape, as uint8."""
  height, width, _ = image.shape
  y = np.clip(y, 0, height - 1)
  x = np.clip(x, 0, width - 1)
  y0 = np.minimum(y.astype(np.int32), max(height - 2, 0))
  x0 = np.minimum(x.astype(np.int32), max(width - 2, 0))
  fy, fx = (y - y0)[..., None], (x - x0)[..., None]
  flat = image.reshape(-1, 3).astype(np.float32)
  at = y0 * width + x0
  down = width if height > 1 else 0
  right = 1 if width > 1 else 0
  top = flat[at] + fx * (flat[at + right] - flat[at])
  bottom = flat[at + down]
  bottom = bottom + fx * (flat[at + down + right] - bottom)
  return np.rint(top + fy * (bottom - top)).astype(np.uint8)
