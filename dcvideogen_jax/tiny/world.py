"""A captioned world: one coloured shape that moves over a quiet background.

Pure numpy; the same seed gives the same clip. A caption states five facts, and
each of them by words of its own, so that a model which gets one wrong can be
told which. Saturation belongs to the shape alone: `tiny/scorer.py` reads
colour, shape and motion back from the pixels.
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
HELD_OUT = 400

# RGB, far apart in hue: orange is missing between red and yellow.
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
# Radius in parts of the shorter side, in the middle of growing or shrinking.
SIZES = {"small": 0.23, "large": 0.28}


class Motion(NamedTuple):
  """What a shape does from one frame to the next.

  Attributes:
    phrase: words of the caption.
    right: picture widths per frame.
    down: picture heights per frame.
    growth: change of the radius's natural logarithm per frame.
  """

  phrase: str
  right: float = 0.0
  down: float = 0.0
  growth: float = 0.0


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
# No shape reaches further up, down or aside than this many radii: the triangle.
_REACH = 1.2
# Shapes begin at a multiple of this, in parts of the picture.
_GRID = 1 / 8
# A motion goes on for this many frames at least, and then may come to rest.
MOVING_FRAMES = 16
_HALF = (MOVING_FRAMES - 1) / 2


class Background(NamedTuple):
  """A nearly grey ground.

  Attributes:
    colour: RGB.
    across: waves per picture width; 0 and 0 for a plain ground.
    along: waves per picture height.
    contrast: levels that the waves add or take.
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

# The first is the usual one.
TEMPLATES = (
  "a {size} {colour} {shape} {motion} over {background}",
  "over {background}, a {size} {colour} {shape} {motion}",
  "a video of a {size} {colour} {shape} that {motion} over {background}",
  "{background} in the background, a {size} {colour} {shape} {motion}",
)


class Scene(NamedTuple):
  """Five facts, each a name of the table of that kind."""

  colour: str
  shape: str
  size: str
  motion: str
  background: str


@functools.cache
def scenes(split: str) -> tuple[Scene, ...]:
  """All combinations of a split, in the order of the tables.

  "heldout" is a fixed random choice of `HELD_OUT` combinations, "train" is the
  rest. Every pair of facts occurs in "train".

  Raises:
    errors.UserError: for another split.
  """
  if split not in SPLITS:
    raise errors.UserError(f"the split must be one of {SPLITS}, not {split!r}")
  tables = (COLOURS, SHAPES, SIZES, MOTIONS, BACKGROUNDS)
  every = [Scene(*names) for names in itertools.product(*tables)]
  held_out = set(sorted(every, key=_digest)[:HELD_OUT])
  return tuple(s for s in every if (s in held_out) == (split == "heldout"))


def _digest(scene: Scene) -> bytes:
  """Random, but the same with every version of everything."""
  return hashlib.sha256(" ".join(scene).encode()).digest()


def caption(scene: Scene, variant: int = 0) -> str:
  """The scene in words, by one of `TEMPLATES`.

  Raises:
    errors.UserError: if there is no such variant.
  """
  if not 0 <= variant < len(TEMPLATES):
    raise errors.UserError(
      f"captions have variants 0 to {len(TEMPLATES) - 1}, not {variant}"
    )
  facts = scene._asdict() | {"motion": MOTIONS[scene.motion].phrase}
  return TEMPLATES[variant].format(**facts)


def clip(
  split: str,
  index: int,
  seed: int = 0,
  frames: int = 16,
  height: int = 64,
  width: int = 64,
) -> tuple[Scene, str, UInt8[np.ndarray, "t h w c"]]:
  """One element of an endless sequence: a scene, its caption, its video.

  Each `len(scenes(split))` elements show every scene once, in a new order. The
  caption is of a random variant.

  Args:
    split: one of `SPLITS`.
    index: non-negative.
    seed: non-negative; another sequence.
    frames: number of frames.
    height: pixels.
    width: pixels.

  Raises:
    errors.UserError: for another split.
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
  """A clip of the scene: place, shade and background vary with the seed.

  Sizes are relative to the picture, speeds too, per frame. Edges are
  anti-aliased. The first frames do not depend on how many are asked for. A
  shape that reaches the edge, or has grown or shrunk for long, comes to rest,
  after `MOVING_FRAMES` or more.

  Args:
    scene: names of the tables.
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
  # Growing and shrinking pass the named size half way.
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
  """One coordinate over time, in parts of the picture.

  It starts where `MOVING_FRAMES` fit before the far edge, if they do at all.
  """
  room = 1 - 2 * margin
  ahead = min(abs(step) * (MOVING_FRAMES - 1), room)
  start = rng.integers(int((room - ahead) / _GRID) + 1) * _GRID
  way = np.minimum(start + np.float32(abs(step)) * t, room)
  return (margin + (room - way if step < 0 else way)).astype(np.float32)


def _margin(scene: Scene, height: int, width: int, extent: int) -> float:
  """How near a shape's middle comes to an edge, in parts of the extent."""
  growth = math.exp(_HALF * abs(MOTIONS[scene.motion].growth))
  widest = min(height, width) * SIZES[scene.size] * growth
  return math.ceil(_REACH * widest / extent / _GRID) * _GRID


def later(scene: Scene, first: int, height: int = 64, width: int = 64) -> Scene:
  """What a clip shows that begins so many frames into a video of the scene.

  Args:
    scene: of the video.
    first: frames before the clip.
    height: pixels.
    width: pixels.

  Returns:
    The scene, or the same standing still once that is sure.

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
  """float32 (h, w, 3): the colour slightly off, and standing waves."""
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
