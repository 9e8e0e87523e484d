"""Procedurally generated motion: coloured shapes that move over textures.

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
  """Returns the signed distance to the lines of a regular polygon's edges."""
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
  """A star of five points, folded onto one edge by its mirror lines."""
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


# Signed distances (negative inside), in units of the shape's radius.
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
  """Renders one to four shapes that move, turn and grow over a background.

  Edges are anti-aliased. Sizes and speeds are relative to the picture.

  Args:
    seed: non-negative; the same seed gives the same clip.
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
  # Colour first, since numpy is slow along a last axis of length 3.
  planes = np.empty((3, frames, height, width), np.float32)
  planes[:] = _background(rng, t, y, x)
  for _ in range(rng.integers(1, 5)):
    _paint_shape(rng, planes, t, y, x)
  planes += np.float32(0.5)
  return np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 3, 0))


def _colour(rng: np.random.Generator) -> np.ndarray:
  """Draws a named colour with noise, or any colour.

  Returns:
    float32 (3, 1, 1, 1), 0 to 255.
  """
  if rng.random() < 0.25:
    colour = rng.uniform(0, 255, 3)
  else:
    named = list(COLOURS.values())[rng.integers(len(COLOURS))]
    colour = np.clip(named + rng.normal(0, 8, 3), 0, 255)
  return colour.astype(np.float32)[:, None, None, None]


def _blend(mask: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Blends from `one`, where the mask (t, h, w) is 0, to `other`."""
  return one + mask * (other - one)


def _waves(rng, t, y, x, size, speed):
  """Draws stripes, a checkerboard or soft blobs in [0, 1], which may drift."""
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
  """Draws a flat colour, a gradient or a texture that fits (3, t, h, w)."""
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
  # Half the textures stand still: computing one frame is cheaper.
  speed = 0.03 * size if kind == 3 else 0.0
  mask = _waves(rng, t if speed else t[:1], y, x, size, speed)
  return _blend(mask * np.float32(rng.uniform(0.3, 1)), one, other)


def _path(rng, frames: int, extent: float) -> np.ndarray:
  """Draws one coordinate over time: a line that bounces, or a swing."""
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
  """Returns the rows or columns that a shape touches in any frame."""
  # The corners of the square reach furthest, to less than 1.25 radii.
  low = float((middle - 1.25 * radius).min()) - 1
  high = float((middle + 1.25 * radius).max()) + 1
  return slice(max(0, math.floor(low)), min(extent, math.ceil(high)))
