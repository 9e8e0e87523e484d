"""Videos piece by piece: split, made of an image amid grey, cut to a size."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Array, Float, Shaped

from dcvideogen_jax import levels

Video = Shaped[Array, "b t h w 3"]
Image = Shaped[Array, "b h w 3"]
Size = tuple[int, int, int]  # Frames, height and width of a video.

_PIECE = 8  # frames that are streamed at a time


def split(video: Video) -> Iterator[Video]:
  """A video some frames at a time."""
  for start in range(0, video.shape[1], _PIECE):
    yield video[:, start : start + _PIECE]


def condition_video(
  image: Image, frames: int, repeats: int, last: Image | None = None
) -> Iterator[Float[Array, "b t h w 3"]]:
  """Pieces of a video: an image so many times, then mid-grey; float32.

  A last image, if there is one, ends the video as many times.
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
  """Leaves out frames, rows and columns beyond the size."""
  left, height, width = size
  for piece in video:
    if left <= 0:
      return
    yield piece[:, :left, :height, :width]
    left -= piece.shape[1]
