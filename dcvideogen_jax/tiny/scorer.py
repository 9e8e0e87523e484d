"""Lists held-out scenes as prompts, and reads facts from the pixels of a clip.

Reading needs neither training nor captions. The shape is the saturated region
of the picture. Its colour is the nearest named colour, its outline the nearest
template, its motion the nearest motion of the table. This also works on clips
that a model generated or an autoencoder blurred.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.tiny import synthetic, world

# A shape's chroma exceeds the background's by at least this many levels of 255.
# Backgrounds differ from grey, and within a picture, by less than 40.
_LEAST_CHROMA = 60.0
# The least area of a shape, as a share of the picture.
_LEAST_AREA = 0.006
# The chroma of the shape is the value that this share of a clip's pixels
# exceeds.
_INSIDE = 0.015
# The least correlation of an outline with a template; below it no shape is
# seen.
_LEAST_LIKENESS = 0.9
# Outlines are compared on a square grid of this many samples per side; the half
# side is in units of the square root of the shape's area.
_SAMPLES, _REACH = 24, 0.95
# Blur of the templates in radii of the shape, and the contrast applied after
# it: models round corners off but still draw an edge.
_BLURS = (0.05, 0.12, 0.2, 0.3)
_CONTRASTS = (1, 2)
# Red minus green, yellow minus blue, lightness. Lightness has a lower weight,
# since it varies with the shade.
_OPPONENT = np.array([[1, -1, 0], [0.5, 0.5, -1], [0.2, 0.25, 0.05]]).T
# A blurred shape's colour is mixed with the background: its own share is
# assumed to be at least the first number. The second weighs the squared
# distance that mixing explains; the sum is the distance to a named colour.
_MOST_MIXED, _MIXING_COST = 0.5, 0.2


class Question(NamedTuple):
  """One video for a model to generate.

  Attributes:
    scene: the scene that the video should show.
    prompt: the scene in words.
    seed: seed of the noise and of the first frame.
  """

  scene: world.Scene
  prompt: str
  seed: int

  def image(self, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Renders a first frame of the scene, for image to video."""
    return world.render(self.scene, self.seed, 1, height, width)[0]


@functools.cache
def questions(count: int) -> tuple[Question, ...]:
  """Returns the first `count` held-out scenes in a fixed random order.

  The variants of the caption alternate. If there are more questions than
  scenes, scenes are repeated in other words and with another seed.

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
  """Sorts scenes in an order that no version of a library can change."""
  return hashlib.sha256(" ".join(("ask", *scene)).encode()).digest()


class Reading(NamedTuple):
  """Facts read from a clip, as names of `world`; None if nothing is seen.

  Attributes:
    colour: a key of `world.COLOURS`.
    shape: one of `world.SHAPES`.
    motion: a key of `world.MOTIONS`.
  """

  colour: str | None
  shape: str | None
  motion: str | None


NOTHING = Reading(None, None, None)


def read(video: UInt8[np.ndarray, "t h w c"]) -> Reading:
  """Reads colour, shape and motion from a clip.

  Only the first `world.MOVING_FRAMES` frames are read. Nothing is seen unless
  at least half of them have a saturated shape. A single frame has no motion.

  Args:
    video: a clip of one scene, rendered or generated.

  Returns:
    The nearest names of `world`, or None for each fact that is not seen.

  Raises:
    TypeError: if the clip is not uint8.
    ValueError: if the clip's shape is not (t, h, w, 3), or frames are smaller
      than 2 by 2 pixels.
  """
  found = _find(video)
  if found is None:
    return NOTHING
  return Reading(
    _nearest_colour(*found.colours),
    _nearest_shape(
      _outline(found.mask, found.rows, found.columns, np.sqrt(found.area))
    ),
    _nearest_motion(
      found.times,
      found.columns / found.mask.shape[2],
      found.rows / found.mask.shape[1],
      np.log(found.area) / 2,
    ),
  )


class Place(NamedTuple):
  """Where the shape of a clip is, and how large, on average over its frames.

  Attributes:
    right, down: its middle, as a share of the picture's width and height.
    size: natural logarithm of the square root of its area in pixels.
  """

  right: float
  down: float
  size: float


def place(video: UInt8[np.ndarray, "t h w c"]) -> Place | None:
  """Returns the place of the shape of a clip; None if nothing is seen.

  Raises:
    TypeError, ValueError: as `read` does.
  """
  found = _find(video)
  if found is None:
    return None
  _, height, width = found.mask.shape
  return Place(
    float(found.columns.mean() / width),
    float(found.rows.mean() / height),
    float(np.log(found.area).mean() / 2),
  )


def spread(groups: Iterable[Iterable[Place | None]]) -> dict[str, float]:
  """Measures how much the places of clips of one prompt differ.

  Args:
    groups: for each prompt the places of its clips; None is left out.

  Returns:
    The standard deviations of "position", over both directions, and of "size",
    as root mean squares over the prompts with two places or more; NaN without
    such a prompt.
  """
  variances = [
    np.var(places, axis=0, ddof=1)
    for group in groups
    if len(places := [x for x in group if x is not None]) > 1
  ]
  if not variances:
    return {"position": math.nan, "size": math.nan}
  right, down, size = np.mean(variances, axis=0)
  return {
    "position": float(np.sqrt(right + down)),
    "size": float(np.sqrt(size)),
  }


class _Found(NamedTuple):
  """The frames in which a shape is seen, and the shape in each of them."""

  mask: np.ndarray
  colours: tuple[np.ndarray, np.ndarray]
  times: np.ndarray
  rows: np.ndarray
  columns: np.ndarray
  area: np.ndarray


def _find(video) -> _Found | None:
  """Finds the shape of a clip; raises as `read` does."""
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
    return None
  hard = mask > 0.5
  area = hard.sum((1, 2))
  times = np.flatnonzero(area > _LEAST_AREA * hard[0].size)
  if 2 * len(times) < len(video):
    return None
  mask, hard, area = mask[times], hard[times], area[times]
  rows = hard.sum(2) @ np.arange(hard.shape[1]) / area
  columns = hard.sum(1) @ np.arange(hard.shape[2]) / area
  return _Found(mask, colours, times, rows, columns, area)


def right(reading: Reading, scene: world.Scene) -> list[bool]:
  """Tells for colour, shape and motion whether the reading has it right."""
  return [getattr(scene, fact) == x for fact, x in reading._asdict().items()]


def score(
  readings: Iterable[Reading], scenes: Iterable[world.Scene]
) -> dict[str, float]:
  """Returns the shares of right readings, from 0 to 1.

  Args:
    readings: what was read from clips.
    scenes: what the clips should show, in the same order.

  Returns:
    The share of clips with the right "colour", "shape" and "motion", and of
    those with "all" three right.

  Raises:
    ValueError: if there are no readings, or their number is not that of the
      scenes.
  """
  facts = np.array(
    [right(*pair) for pair in zip(readings, scenes, strict=True)]
  )
  if not facts.size:
    raise ValueError("there are no readings to score")
  shares = dict(zip(Reading._fields, facts.mean(0).tolist(), strict=True))
  return shares | {"all": float(facts.all(1).mean())}


def _segment(video):
  """Separates the shape from the background.

  Returns:
    The share of the shape in each pixel, (t, h, w); and the colours of the
    shape's middle and of the background, in the space of `_OPPONENT`. Both are
    None if nothing stands out.
  """
  colours = _smoothed(video.astype(np.float32) @ _OPPONENT.astype(np.float32))
  # Every other row and column is enough, and faster.
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
  """Averages 3 by 3 pixels of (t, h, w, c), with edges repeated."""
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
  """Samples the mask (t, h, w) around its middle; averages over frames."""
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
  """Returns standardised outlines: (shapes, blurs and contrasts, samples)."""
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
  """Flattens (n, y, x) to zero mean and unit length; flat outlines are zero."""
  flat = outlines.reshape(len(outlines), -1)
  flat = flat - flat.mean(1, keepdims=True)
  return flat / (np.sqrt(np.square(flat).sum(1, keepdims=True)) + 1e-6)


def _nearest_shape(outline) -> str | None:
  likeness = (_templates() @ _standardised(outline[None])[0]).max(1)
  if likeness.max() < _LEAST_LIKENESS:
    return None
  return world.SHAPES[int(likeness.argmax())]


def _nearest_motion(times, right, down, growth) -> str | None:
  """Finds the motion nearest to the median slopes over all pairs of frames."""
  if len(times) < 2:
    return None
  early, late = np.triu_indices(len(times), 1)
  unit = np.array([world.SPEED, world.SPEED, world.GROWTH])
  places = np.array([right, down, growth])
  slopes = (places[:, late] - places[:, early]) / (times[late] - times[early])
  known = np.array([motion[1:] for motion in world.MOTIONS.values()])
  distances = np.square((known - np.median(slopes, 1)) / unit).sum(1)
  return list(world.MOTIONS)[int(distances.argmin())]
