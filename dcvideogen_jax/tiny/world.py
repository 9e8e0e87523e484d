"""A captioned world: one coloured shape that moves over a quiet background.

Pure numpy; the same seed gives the same clip. A caption states five facts, each
in words of its own, so that a wrong video shows which fact a model missed. Only
the shape is saturated, which lets `tiny/scorer.py` read its colour, outline and
motion from the pixels.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.tiny import synthetic

SPLITS = ("train", "heldout")
# Number of held-out scenes.
HELD_OUT = 400

# RGB. The hues lie far apart, which is why there is no orange.
COLOURS = {
  "red": (220, 35, 35),
  "yellow": (245, 215, 40),
  "green": (40, 165, 60),
  "cyan": (60, 205, 220),
  "blue": (30, 70, 225),
  "purple": (130, 40, 180),
  "pink": (250, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
# Radius as a share of the shorter side; half way through growing or shrinking.
SIZES = {"small": 0.23, "large": 0.28}


class Motion(NamedTuple):
  """How a shape changes from one frame to the next.

  Attributes:
    phrase: the words of the caption.
    right: picture widths per frame.
    down: picture heights per frame.
    growth: change of the radius's natural logarithm per frame.
  """

  phrase: str
  right: float = 0.0
  down: float = 0.0
  growth: float = 0.0


# Picture widths or heights, and the logarithm of the radius, per frame.
SPEED, GROWTH = 1 / 64, 0.03
MOTIONS = {
  "left": Motion("moves left", right=-SPEED),
  "right": Motion("moves right", right=SPEED),
  "up": Motion("moves up", down=-SPEED),
  "down": Motion("moves down", down=SPEED),
  "still": Motion("stands still"),
  "grows": Motion("grows", growth=GROWTH),
  "shrinks": Motion("shrinks", growth=-GROWTH),
}
# The triangle reaches furthest from its centre: this many radii.
_REACH = 1.2
# Starting positions are multiples of this share of the picture.
_GRID = 1 / 8
# A shape moves for at least this many frames; then it may come to rest.
MOVING_FRAMES = 16
_HALF = (MOVING_FRAMES - 1) / 2


class Background(NamedTuple):
  """A nearly grey background.

  Attributes:
    colour: RGB, 0 to 255.
    across: waves per picture width.
    along: waves per picture height; a plain background has neither.
    contrast: amplitude of the waves in grey levels of 255.
  """

  colour: tuple[int, int, int]
  across: float = 0.0
  along: float = 0.0
  contrast: float = 0.0


BACKGROUNDS = {
  "paper": Background((232, 228, 220)),
  "fog": Background((186, 190, 194), 0.7, 0.5, 14.0),
  "desert": Background((178, 160, 134), 0.9, 1.8, 12.0),
  "meadow": Background((112, 124, 100), 1.6, 1.2, 10.0),
  "lake": Background((100, 116, 130), 0.2, 2.6, 10.0),
  "road": Background((84, 84, 88), 0.0, 0.5, 16.0),
  "forest": Background((48, 60, 50), 2.6, 0.2, 10.0),
  "ocean": Background((28, 36, 50), 0.4, 1.5, 8.0),
}

# `caption` takes the first one by default.
TEMPLATES = (
  "a {size} {colour} {shape} {motion} over {background}",
  "over {background}, a {size} {colour} {shape} {motion}",
  "a video of a {size} {colour} {shape} that {motion} over {background}",
  "{background} in the background, a {size} {colour} {shape} {motion}",
)


class Scene(NamedTuple):
  """The five facts of a scene.

  Attributes:
    colour: a key of `COLOURS`.
    shape: one of `SHAPES`.
    size: a key of `SIZES`.
    motion: a key of `MOTIONS`.
    background: a key of `BACKGROUNDS`.
  """

  colour: str
  shape: str
  size: str
  motion: str
  background: str


@functools.cache
def scenes(split: str) -> tuple[Scene, ...]:
  """Returns all scenes of a split, in the order of the tables.

  "heldout" is a fixed random choice of `HELD_OUT` combinations of facts;
  "train" has all others. Every pair of facts occurs in "train".

  Raises:
    errors.UserError: if `split` is not one of `SPLITS`.
  """
  if split not in SPLITS:
    raise errors.UserError(f"the split must be one of {SPLITS}, not {split!r}")
  tables = (COLOURS, SHAPES, SIZES, MOTIONS, BACKGROUNDS)
  every = [Scene(*names) for names in itertools.product(*tables)]
  held_out = set(sorted(every, key=_digest)[:HELD_OUT])
  return tuple(s for s in every if (s in held_out) == (split == "heldout"))


def _digest(scene: Scene) -> bytes:
  """Sorts scenes in an order that no version of a library can change."""
  return hashlib.sha256(" ".join(scene).encode()).digest()


def caption(scene: Scene, variant: int = 0) -> str:
  """Describes the scene in words, by `TEMPLATES[variant]`.

  Raises:
    errors.UserError: if there is no such variant.
  """
  if not 0 <= variant < len(TEMPLATES):
    raise errors.UserError(
      f"captions have variants 0 to {len(TEMPLATES) - 1}, not {variant}"
    )
  facts = scene._asdict() | {"motion": MOTIONS[scene.motion].phrase}
  return TEMPLATES[variant].format(**facts)


def scene_of(text: str) -> Scene | None:
  """Returns the scene that a caption describes; None for another text."""
  return _captions().get(text)


@functools.cache
def _captions() -> dict[str, Scene]:
  every = [scene for split in SPLITS for scene in scenes(split)]
  variants = range(len(TEMPLATES))
  return {caption(scene, i): scene for scene in every for i in variants}


def clip(
  split: str,
  index: int,
  seed: int = 0,
  frames: int = 16,
  height: int = 64,
  width: int = 64,
) -> tuple[Scene, str, UInt8[np.ndarray, "t h w c"]]:
  """Returns an element of an endless sequence: scene, caption and video.

  Every `len(scenes(split))` elements show each scene once, in a new order. The
  variant of the caption is random.

  Args:
    split: one of `SPLITS`.
    index: position in the sequence, non-negative.
    seed: selects the sequence, non-negative.
    frames: number of frames.
    height: pixels.
    width: pixels.

  Raises:
    errors.UserError: if `split` is not one of `SPLITS`.
  """
  every = scenes(split)
  epoch, at = divmod(index, len(every))
  scene = every[_order(split, seed, epoch)[at]]
  rng = np.random.default_rng((SPLITS.index(split), seed, index))
  words = caption(scene, int(rng.integers(len(TEMPLATES))))
  return scene, words, _render(scene, rng, frames, height, width)


@functools.lru_cache(maxsize=8)
def _order(split: str, seed: int, epoch: int) -> np.ndarray:
  rng = np.random.default_rng((SPLITS.index(split), seed, epoch, 1))
  return rng.permutation(len(scenes(split)))


def render(
  scene: Scene,
  seed: int | Sequence[int],
  frames: int = 16,
  height: int = 64,
  width: int = 64,
) -> UInt8[np.ndarray, "t h w c"]:
  """Renders a clip of the scene; position, shades and waves vary with the seed.

  Sizes and speeds are relative to the picture. Edges are anti-aliased. The
  first frames do not depend on `frames`. A shape moves until it reaches the
  edge, which takes at least `MOVING_FRAMES` frames if the picture has room for
  that; it grows or shrinks for `MOVING_FRAMES` frames.

  Args:
    scene: the scene.
    seed: non-negative.
    frames: number of frames.
    height: pixels.
    width: pixels.
  """
  rng = np.random.default_rng(seed)
  return _render(scene, rng, frames, height, width)


def _render(scene, rng, frames, height, width):
  motion = MOTIONS[scene.motion]
  size = SIZES[scene.size]
  t = np.arange(frames, dtype=np.float32)[:, None, None]
  # A growing or shrinking shape has its nominal size half way.
  way = np.clip(t - _HALF, -_HALF, _HALF) * np.float32(motion.growth)
  radius = np.float32(min(height, width) * size) * np.exp(way)
  x, y = (
    _path(rng, step, _margin(scene, height, width, extent), t)
    * np.float32(extent)
    for step, extent in ((motion.right, width), (motion.down, height))
  )
  dy = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5) - y
  dx = np.arange(width, dtype=np.float32) + np.float32(0.5) - x
  distance = synthetic.SHAPES[scene.shape](dx / radius, dy / radius) * radius
  alpha = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
  ground = _ground(BACKGROUNDS[scene.background], rng, height, width)
  shade = rng.uniform(0.92, 1.06)
  colour = np.array(COLOURS[scene.colour]) * shade + rng.normal(0, 4, 3)
  colour = np.clip(colour, 0, 255).astype(np.float32)
  video = ground + alpha * (colour - ground) + np.float32(0.5)
  return np.clip(video, 0, 255).astype(np.uint8)


def _path(rng, step: float, margin: float, t: np.ndarray) -> np.ndarray:
  """Returns one coordinate of the centre over time, as a share of the picture.

  The start leaves room for `MOVING_FRAMES` frames of motion before the far
  edge, if the picture has that much room.
  """
  room = 1 - 2 * margin
  ahead = min(abs(step) * (MOVING_FRAMES - 1), room)
  start = rng.integers(int((room - ahead) / _GRID) + 1) * _GRID
  way = np.minimum(start + np.float32(abs(step)) * t, room)
  return (margin + (room - way if step < 0 else way)).astype(np.float32)


def _margin(scene: Scene, height: int, width: int, extent: int) -> float:
  """Returns the centre's least distance to an edge, as a share of the side."""
  growth = math.exp(_HALF * abs(MOTIONS[scene.motion].growth))
  widest = min(height, width) * SIZES[scene.size] * growth
  return math.ceil(_REACH * widest / extent / _GRID) * _GRID


def later(scene: Scene, first: int, height: int = 64, width: int = 64) -> Scene:
  """Returns what a later clip of a video shows.

  Args:
    scene: the scene of the video.
    first: number of the clip's first frame in the video.
    height: pixels.
    width: pixels.

  Returns:
    The scene, with the motion "still" if the shape is sure to have come to rest
    by then.

  Raises:
    errors.UserError: if the shape may come to rest within the clip.
  """
  motion = MOTIONS[scene.motion]
  if not first:
    return scene
  rest = float(MOVING_FRAMES)
  for step, extent in ((motion.right, width), (motion.down, height)):
    if step:
      room = 1 - 2 * _margin(scene, height, width, extent)
      rest = max(rest, room / abs(step))
  if first < rest and scene.motion != "still":
    raise errors.UserError(
      f"the motion of a clip that begins at frame {first} is not known: it may"
      f" end before frame {math.ceil(rest)}; read one from frame 0, or then"
    )
  return scene._replace(motion="still")


def _ground(background: Background, rng, height: int, width: int) -> np.ndarray:
  """Returns float32 (h, w, 3): the colour in a random shade, plus waves."""
  phase = rng.uniform(0, 2 * math.pi)
  across = background.across * rng.choice((-1, 1))
  y = np.linspace(0, 1, height)[:, None]
  wave = np.sin(
    2 * math.pi * (across * np.linspace(0, 1, width) + background.along * y)
    + phase
  )
  shade = rng.normal(0, 3) + rng.normal(0, 1.5, 3)
  ground = background.colour + shade + background.contrast * wave[..., None]
  return ground.astype(np.float32)
