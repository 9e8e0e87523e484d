"""Reads the beginning of a captioned video, in the size of a bucket."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets, captions, clip_images, timing, video


class Loaded(NamedTuple):
  """The beginning of a video.

  Attributes:
    video: RGB levels, resized and cropped to the size of a bucket.
    first: the first frame in the size of the file.
    meta: "file", "captions", "scores" and "fps" of the clip, and further facts
      of the source, such as "file_fps".
  """

  video: UInt8[np.ndarray, "t h w 3"]
  first: UInt8[np.ndarray, "h w 3"]
  meta: dict[str, Any]

  def pixels(self, size: int, stretch: bool) -> np.ndarray:
    """Returns the first frame prepared for CLIP: float32 (size, size, 3).

    Args:
      size: height and width of the result in pixels.
      stretch: whether to stretch the whole first frame of the file, as in the
        official training, instead of taking the centre of the clip's first
        frame, as in the released pipeline.
    """
    image = self.first if stretch else self.video[0]
    return clip_images.preprocess(image, size, stretch=stretch)


class Place(NamedTuple):
  """The properties of a clip that are known before it is read.

  Attributes:
    size: size of the clip's bucket.
    seconds: duration of the whole video; None if its frame rate is unknown.
    fps: frames per second of the file; 0 if unknown.
  """

  size: buckets.Size
  seconds: float | None
  fps: float


def place(
  path: pathlib.Path,
  frames: int,
  sizes: Sequence[buckets.Size],
  fps: float | None,
  seen: video.VideoInfo | errors.UserError | None = None,
) -> Place:
  """Returns bucket, duration and frame rate of a video without loading it.

  Args:
    path, frames, sizes, fps, seen: as for `load`.

  Raises:
    errors.UserError: as `load`.
  """
  info, size = _look(path, frames, sizes, fps, seen)
  return Place(size, info.seconds or None, info.fps)


def load(
  path: pathlib.Path,
  clip: captions.Captioned,
  frames: int,
  sizes: Sequence[buckets.Size],
  fps: float | None,
  seen: video.VideoInfo | errors.UserError | None = None,
) -> Loaded:
  """Reads the beginning of a video, in the bucket of the nearest shape.

  Args:
    path: path of the video file.
    clip: name and captions of the clip.
    frames: frames of the clip.
    sizes: sizes of the buckets.
    fps: frames per second of the clip; None keeps the file's frame rate.
    seen: the result of `probing.probe` for the file; None probes the file.

  Raises:
    errors.UserError: if the file is missing, damaged or has too few frames. The
      message says "it" in place of the path, as lists of clips name the file.
  """
  info, size = _look(path, frames, sizes, fps, seen)
  timing.tell(clip.file, info, fps)
  shown: list[np.ndarray] = []
  first, last = None, None
  with _about(path):
    for frame in timing.frames(path, info, fps):
      if frame is not last:
        array = frame.rgb()
        first = array if first is None else first
        array, last = buckets.fit(array, size), frame
      shown.append(array)
      if len(shown) == frames:
        break
  # A file may hold fewer frames than its container claims.
  _require(len(shown), frames, info, fps)
  meta = {
    "file": clip.file,
    "captions": list(clip.captions),
    "scores": None if clip.scores is None else list(clip.scores),
    "fps": round(fps or info.fps, 3),
    "file_fps": round(info.fps, 3),
  }
  return Loaded(np.stack(shown), first, meta)


def _look(
  path, frames, sizes, fps, seen
) -> tuple[video.VideoInfo, buckets.Size]:
  """Returns what probing a video gives, and the bucket of the video."""
  with _about(path):
    if isinstance(seen, errors.UserError):
      raise seen
    info = seen or video.probe(path)
  _require(timing.count(info, fps), frames, info, fps)
  return info, buckets.nearest(info.height, info.width, sizes)


@contextlib.contextmanager
def _about(path: pathlib.Path):
  """Replaces the path in a UserError with "it", as a list names the file."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(str(e).replace(str(path), "it")) from e


def _require(
  found: int, needed: int, info: video.VideoInfo, fps: float | None
) -> None:
  if found < needed:
    raise errors.UserError(
      f"it has {found} frames{timing.rate(info, fps)}, fewer than {needed}"
    )
