"""Asks for held-out scenes of the world, and reads what a clip shows.

Reading is from the pixels, without training or captions: the shape is what is
saturated, its colour is the nearest named one, its outline the nearest
template, its motion the nearest of the table. What a model generated or an
autoencoder blurred is read as well.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.tiny import synthetic, world

# Levels of chroma above the background that make a shape; backgrounds differ
# from grey, and within a picture, by less than 40.
_LEAST_CHROMA = 60.0
# Parts of the picture: a smaller spot is no shape.
_LEAST_AREA = 0.006
# A clip's chroma that this part of its pixels exceeds is that of the shape.
_INSIDE = 0.015
# An outline less like every template than this is of no shape in the table.
_LEAST_LIKENESS = 0.9
# Outlines are compared on a grid of this many samples across a square of this
# half width, in square roots of the area.
_SAMPLES, _REACH = 24, 0.95
# Blur of the templates, in radii of the shape, and contrast after it: models
# round corners off and still draw an edge.
_BLURS = (0.05, 0.12, 0.2, 0.3)
_CONTRASTS = (1, 2)
# Red minus green, yellow minus blue, lightness. Lightness counts less, since
# it differs with shade.
_OPPONENT = np.array([[1, -1, 0], [0.5, 0.5, -1], [0.2, 0.25, 0.05]]).T
# A blurred shape's colour is mixed with the background, by half at most. This
# times the squared distance of mixing counts as distance to a colour.
_MOST_MIXED, _MIXING_COST = 0.5, 0.2


class Question(NamedTuple):
  """One video to ask for.

  Attributes:
    scene: what it shall show.
    prompt: the scene in words.
    seed: of the noise, and of the first frame.
  """

  scene: world.Scene
  prompt: str
  seed: int

  def image(self, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A first frame of the scene, for image to video."""
    return world.render(self.scene, self.seed, 1, height, width)[0]


@functools.cache
def questions(count: int) -> tuple[Question, ...]:
  """The first `count` held-out scenes in a fixed random order.

  All ways to put a scene into words take turns; more questions than scenes ask
  for a scene again, in other words and with another seed.

  Raises:
    errors.UserError: if the count is not positive.
  """
  if count < 1:
    raise errors.UserError(f"expected at least one prompt, found {count}")
  scenes = sorted(world.scenes("heldout"), key=_random)
  asked = []
  for i in range(count):
    turn, at = divmod(i, len(scenes))
    words = world.caption(scenes[at], (i + turn) % len(world.TEMPLATES))
    asked.append(Question(scenes[at], words, i))
  return tuple(asked)


def _random(scene: world.Scene) -> bytes:
  """Sorts scenes in an order that no library's next version changes."""
  return hashlib.sha256(" ".join(("ask", *scene)).encode()).digest()


class Reading(NamedTuple):
  """Names of the tables of `world`; None where nothing is seen."""

  colour: str | None
  shape: str | None
  motion: str | None


NOTHING = Reading(None, None, None)


def read(video: UInt8[np.ndarray, "t h w c"]) -> Reading:
  """What a clip shows, strictly of the world's names.

  Nothing is seen where no saturated shape is in at least half of the frames.
  Motion is that of the first `world.MOVING_FRAMES` frames; one frame has none.

  Args:
    video: a clip of one scene, rendered or like it.

  Raises:
    TypeError: if it is not uint8.
    ValueError: if its shape is another.
  """
  video = np.asarray(video)
  if video.dtype != np.uint8:
    raise TypeError(f"a clip must be uint8, not {video.dtype}")
  if video.ndim != 4 or video.shape[-1] != 3 or not video.size:
    raise ValueError(f"a clip must be (t, h, w, 3), not {video.shape}")
  if min(video.shape[1:3]) < 2:
    raise ValueError(f"a picture of {video.shape[1:3]} pixels shows no shape")
  video = video[: world.MOVING_FRAMES]
  mask, colours = _segment(video)
  if mask is None:
    return NOTHING
  hard = mask > 0.5
  area = hard.sum((1, 2))
  times = np.flatnonzero(area > _LEAST_AREA * hard[0].size)
  if 2 * len(times) < len(video):
    return NOTHING
  mask, hard, area = mask[times], hard[times], area[times]
  rows = hard.sum(2) @ np.arange(hard.shape[1]) / area
  columns = hard.sum(1) @ np.arange(hard.shape[2]) / area
  return Reading(
    _nearest_colour(*colours),
    _nearest_shape(_outline(mask, rows, columns, np.sqrt(area))),
    _nearest_motion(
      times, columns / hard.shape[2], rows / hard.shape[1], np.log(area) / 2
    ),
  )


def right(reading: Reading, scene: world.Scene) -> list[bool]:
  """Which of the facts that a clip should show are read from it, in order."""
  return [getattr(scene, fact) == x for fact, x in reading._asdict().items()]


def score(
  readings: Iterable[Reading], scenes: Iterable[world.Scene]
) -> dict[str, float]:
  """Shares of right readings: "colour", "shape", "motion", "all" three.

  Args:
    readings: of clips.
    scenes: what the clips should show, in the same order.

  Raises:
    ValueError: if there are none, or not as many of one as of the other.
  """
  facts = np.array(
    [right(*pair) for pair in zip(readings, scenes, strict=True)]
  )
  if not facts.size:
    raise ValueError("there are no readings to score")
  shares = dict(zip(Reading._fields, facts.mean(0).tolist(), strict=True))
  return shares | {"all": float(facts.all(1).mean())}


def _segment(video):
  """How much of the shape each pixel is, (t, h, w), and two colours.

  They are that of the shape's middle and that of the background, in the space
  of `_OPPONENT`. None and None if nothing stands out.
  """
  colours = _smoothed(video.astype(np.float32) @ _OPPONENT.astype(np.float32))
  # Every other row and column will do, and is fast.
  ground = np.median(colours[:, ::2, ::2], (0, 1, 2))
  chroma = colours[..., :2] - ground[:2]
  strength = np.sqrt(np.square(chroma).sum(-1))
  inside = np.quantile(strength[:, ::2, ::2], 1 - _INSIDE)
  if inside < _LEAST_CHROMA:
    return None, None
  core = strength > 0.75 * inside
  middle = chroma[core].mean(0)
  mask = chroma @ (middle / np.square(middle).sum())
  return mask, (colours[core].mean(0), ground)


def _smoothed(x):
  """Means of 3 by 3 pixels of (t, h, w, c), edges repeated."""
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
  x = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
  return (x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]) / np.float32(9)


def _nearest_colour(middle, ground) -> str:
  known = np.array(list(world.COLOURS.values())) @ _OPPONENT - ground
  length = np.square(known).sum(-1)
  part = np.clip(known @ (middle - ground) / length, _MOST_MIXED, 1)
  off = np.square(part[:, None] * known - (middle - ground)).sum(-1)
  distances = off + _MIXING_COST * np.square(1 - part) * length
  return list(world.COLOURS)[int(distances.argmin())]


def _outline(mask, rows, columns, scale):
  """The mask (t, h, w) around its middle, at a common scale: mean over time."""
  grid = np.linspace(-_REACH, _REACH, _SAMPLES)
  y, x = (
    np.clip(middle[:, None] + scale[:, None] * grid, 0, extent - 1.001)
    for middle, extent in zip((rows, columns), mask.shape[1:], strict=True)
  )
  low_y, low_x = y.astype(int)[:, :, None], x.astype(int)[:, None]
  y, x = y[:, :, None] - low_y, x[:, None] - low_x
  t = np.arange(len(mask))[:, None, None]
  top, bottom = (
    (1 - x) * mask[t, low_y + down, low_x]
    + x * mask[t, low_y + down, low_x + 1]
    for down in (0, 1)
  )
  return ((1 - y) * top + y * bottom).mean(0)


@functools.cache
def _templates() -> np.ndarray:
  """Standardised outlines of the shapes, in several forms: (k, forms, n)."""
  radius = 20
  at = np.arange(-2.4 * radius, 2.4 * radius + 1)
  y, x = np.meshgrid(at / radius, at / radius, indexing="ij")
  outlines = []
  for shape, blur, contrast in itertools.product(
    world.SHAPES, _BLURS, _CONTRASTS
  ):
    mask = np.clip(0.5 - synthetic.SHAPES[shape](x, y) * radius, 0, 1)
    kernel = np.exp(-np.square((at[:, None] - at) / (blur * radius)) / 2)
    kernel /= kernel.sum(1, keepdims=True)
    mask = kernel @ mask @ kernel.T
    mask = np.clip((mask / mask.max() - 0.5) * contrast + 0.5, 0, 1)
    middle, area = np.array([len(at) / 2 - 0.5]), np.array([(mask > 0.5).sum()])
    outlines.append(_outline(mask[None], middle, middle, np.sqrt(area)))
  return _standardised(np.array(outlines)).reshape(
    len(world.SHAPES), len(_BLURS) * len(_CONTRASTS), -1
  )


def _standardised(outlines):
  """Zero mean and unit length of (n, y, x), zero where nothing differs."""
  flat = outlines.reshape(len(outlines), -1)
  flat = flat - flat.mean(1, keepdims=True)
  return flat / (np.sqrt(np.square(flat).sum(1, keepdims=True)) + 1e-6)


def _nearest_shape(outline) -> str | None:
  likeness = (_templates() @ _standardised(outline[None])[0]).max(1)
  if likeness.max() < _LEAST_LIKENESS:
    return None
  return world.SHAPES[int(likeness.argmax())]


def _nearest_motion(times, right, down, growth) -> str | None:
  """From the median slopes of pairs of frames."""
  if len(times) < 2:
    return None
  early, late = np.triu_indices(len(times), 1)
  unit = np.array([world.SPEED, world.SPEED, world.GROWTH])
  places = np.array([right, down, growth])
  slopes = (places[:, late] - places[:, early]) / (times[late] - times[early])
  known = np.array([motion[1:] for motion in world.MOTIONS.values()])
  distances = np.square((known - np.median(slopes, 1)) / unit).sum(1)
  return list(world.MOTIONS)[int(distances.argmin())]
