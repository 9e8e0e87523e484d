"""Which sizes can be generated, and the latents they need."""

import math
import operator
from typing import Any, NamedTuple

from dcvideogen_jax import errors

# Pixels of the official image-to-video default, 720 x 1280.
AREA = 720 * 1280

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
  found = {"frames": frames, "height": height, "width": width}
  for name, n in found.items():
    try:
      found[name] = operator.index(n)
    except TypeError:
      found[name] = 0
    if isinstance(n, bool) or found[name] < 1:
      raise errors.UserError(f"{name} must be at least 1, found {n!r}")
  return Size(**found)


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
