"""Which sizes can be generated, and the latents they need."""

import math
import operator
from typing import Any, NamedTuple

from dcvideogen_jax import errors

# Pixels of the official image-to-video default, 720 x 1280.
AREA = 720 * 1280
# Of a side, in pixels.
_LONGEST = 2**16

RULES = ("exact", "official")


class Size(NamedTuple):
  """A video's size: frames, and pixels in height and width."""

  frames: int
  height: int
  width: int


def checked(frames: Any, height: Any, width: Any) -> Size:
  """A size of three positive whole numbers.

  Raises:
    errors.UserError: names the one that is not.
  """
  size = {"frames": frames, "height": height, "width": width}
  for name, n in size.items():
    try:
      size[name] = operator.index(n)
    except TypeError:
      size[name] = 0
    if isinstance(n, bool) or size[name] < 1:
      raise errors.UserError(f"{name} must be at least 1, found {n!r}")
    if name != "frames" and size[name] > _LONGEST:
      raise errors.UserError(f"{name} must be at most {_LONGEST}, found {n!r}")
  return Size(**size)


def asked(
  frames: Any,
  height: Any | None,
  width: Any | None,
  area: int,
  image: tuple[int, int] | None,
  multiple: int,
  rule: str,
) -> Size:
  """The size that arguments name, before a rule rounds it.

  Args:
    frames, height, width: as given; without both sides an image's shape
      counts, and without an image they are 480 and 832.
    area: pixels of a video that has the image's shape.
    image: height and width, or None.
    multiple: pixels that the official rule rounds an image's sides down to.
    rule: out of `RULES`.

  Raises:
    errors.UserError: if they make no size.
  """
  if rule not in RULES:
    raise errors.UserError(
      f"size_rule must be {' or '.join(RULES)}, found {rule!r}"
    )
  if (height is None) != (width is None):
    raise errors.UserError(
      f"give both height and width or neither, found {height} and {width}"
    )
  if height is None:
    height, width = 480, 832
    if image is not None:
      if isinstance(area, bool) or not 1 <= area <= _LONGEST**2:
        raise errors.UserError(
          f"area must be from 1 to {_LONGEST**2} pixels, found {area!r}"
        )
      # Two exact sides are even, as players like them.
      rounding = multiple if rule == "official" else 2
      height, width = of_image(*image, area, rounding)
  return checked(frames, height, width)


def official(size: Size, spatial: int, temporal: int, first: int) -> Size:
  """What the official pipelines make of a size: they round down.

  720 rows become 704 and 81 frames 80 with DC-AE-V.

  Args:
    size: what was asked for.
    spatial: pixels that height and width become multiples of.
    temporal: frames per latent frame.
    first: frames that the first latent frame has less.

  Raises:
    errors.UserError: if nothing is left.
  """
  frames = (size.frames + first) // temporal * temporal - first
  rounded = Size(
    max(1, frames),
    size.height // spatial * spatial,
    size.width // spatial * spatial,
  )
  if not rounded.height or not rounded.width:
    raise errors.UserError(
      f"{size.height}x{size.width} is rounded down to multiples of {spatial}, "
      "which leaves nothing: use larger sides or the exact rule"
    )
  return rounded


def of_image(
  height: int, width: int, area: int = AREA, multiple: int = 1
) -> tuple[int, int]:
  """Height and width of about `area` pixels, shaped as an image.

  Args:
    height, width: of the image.
    area: pixels of the video.
    multiple: both sides are rounded down to multiples of this, as the official
      code does with 32 (DC-Gen `generate.py`, commit cae2205).
  """
  aspect = height / width
  rows, columns = (
    max(multiple, round(math.sqrt(area * ratio)) // multiple * multiple)
    for ratio in (aspect, 1 / aspect)
  )
  return rows, columns
