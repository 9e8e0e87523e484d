"""Checks and rounds the sizes of videos."""

import math
import operator
from typing import Any, NamedTuple

from dcvideogen_jax import errors

# Pixels of the official image-to-video default, 720 x 1280.
AREA = 720 * 1280
# Longest side, in pixels.
_LONGEST = 2**16

RULES = ("exact", "official")


class Size(NamedTuple):
  """A video's size: frames, and pixels in height and width."""

  frames: int
  height: int
  width: int


def checked(frames: Any, height: Any, width: Any) -> Size:
  """Checks three positive whole numbers and returns them as a size.

  Args:
    frames: number of frames.
    height, width: in pixels, at most 2^16.

  Raises:
    errors.UserError: names the number that does not fit.
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
  """Returns the size that arguments ask for, before a rule rounds it.

  Args:
    frames, height, width: as given. If both sides are None, the video has the
      image's shape, or 480 x 832 pixels without an image.
    area: pixels of a video that has the image's shape.
    image: height and width of the image, or None.
    multiple: under the official rule, the sides of a video in an image's shape
      are rounded down to multiples of this.
    rule: one of `RULES`.

  Raises:
    errors.UserError: if the arguments do not make a size.
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
      # The exact rule makes both sides even, as video players prefer.
      rounding = multiple if rule == "official" else 2
      height, width = of_image(*image, area, rounding)
  return checked(frames, height, width)


def official(size: Size, spatial: int, temporal: int, first: int) -> Size:
  """Rounds a size down, as the official pipelines do.

  720 rows become 704 and 81 frames 80 with DC-AE-V.

  Args:
    size: what was asked for.
    spatial: height and width become multiples of this.
    temporal: frames per latent frame.
    first: number of frames by which the first latent frame is shorter.

  Raises:
    errors.UserError: if a side becomes 0.
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
  """Returns height and width of about `area` pixels in the shape of an image.

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
