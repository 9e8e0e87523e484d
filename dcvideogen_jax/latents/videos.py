"""Streams of video pieces: splitting, condition videos, cutting to a size.

A piece holds consecutive frames of a video, `b t h w 3`. Pixels are uint8
levels or floats in [-1, 1]; mid-grey is 0.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Shaped

from dcvideogen_jax import levels
from dcvideogen_jax.arrays import Array

Video = Shaped[Array, "b t h w 3"]
Image = Shaped[Array, "b h w 3"]
Size = tuple[int, int, int]  # Frames, height and width in pixels of a video.

_PIECE = 8  # Frames in a piece.


def split(video: Video) -> Iterator[Video]:
  """Yields the pieces of a video that is held in memory."""
  for start in range(0, video.shape[1], _PIECE):
    yield video[:, start : start + _PIECE]


def condition_video(
  image: Image, frames: int, repeats: int, last: Image | None = None
) -> Iterator[Float[Array, "b t h w 3"]]:
  """Yields the video that an image-to-video model encodes as its condition.

  The video shows the first image, then mid-grey, then the last image if one is
  given.

  Args:
    image: the first images of a batch.
    frames: frames in the video.
    repeats: frames that show the first image, and also the last image.
    last: the last images of the batch, or None.

  Yields:
    Pieces of the video, float32 in [-1, 1].
  """
  first = levels.to_float(image)[:, None]
  yield first.repeat(repeats, 1)
  end = frames if last is None else frames - repeats
  for start in range(repeats, end, _PIECE):
    count = min(_PIECE, end - start)
    shape = (first.shape[0], count, *first.shape[2:])
    yield np.zeros(shape, np.float32)
  if last is not None:
    yield levels.to_float(last)[:, None].repeat(repeats, 1)


def cut(video: Iterable[np.ndarray], size: Size) -> Iterator[np.ndarray]:
  """Yields the pieces without frames, rows and columns beyond the size."""
  left, height, width = size
  for piece in video:
    if left <= 0:
      return
    yield piece[:, :left, :height, :width]
    left -= piece.shape[1]
