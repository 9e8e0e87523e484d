"""Reading the beginning of a captioned video, at the size of a bucket."""

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
    video: (t, h, w, 3), resized and cut.
    first: the first frame as the file has it.
    meta: "file", "captions", "scores", "fps" of the clip, and what else is
      known, such as "file_fps".
  """

  video: UInt8[np.ndarray, "t h w 3"]
  first: UInt8[np.ndarray, "h w 3"]
  meta: dict[str, Any]

  def pixels(self, size: int, stretch: bool) -> np.ndarray:
    """What CLIP sees of the clip: float32 (size, size, 3).

    The middle of the first frame as it was cut out, which is what the released
    pipeline shows; or, stretched, the whole first frame of the file, as in the
    official training.
    """
    image = self.first if stretch else self.video[0]
    return clip_images.preprocess(image, size, stretch=stretch)


class Place(NamedTuple):
  """What is known of a clip before it is read.

  Attributes:
    size: of its bucket.
    seconds: of the whole video; None if its frame rate is unknown.
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
  """Looks at a video; arguments and errors as of `load`."""
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
  """Reads the beginning of a video, for the nearest size.

  Args:
    path: of the file.
    clip: its name, and what is said of it.
    frames: that are needed.
    sizes: of the buckets.
    fps: frames per second of the clip; None is as the file has them.
    seen: what `probing.probe` says of the file; None looks at it.

  Raises:
    errors.UserError: if it is missing, damaged or has fewer frames; without the
      path, which a list has already.
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
  # What the container says is not always so.
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
  """What is known of a video, or what the file says; and its bucket."""
  with _about(path):
    if isinstance(seen, errors.UserError):
      raise seen
    info = seen or video.probe(path)
  _require(timing.count(info, fps), frames, info, fps)
  return info, buckets.nearest(info.height, info.width, sizes)


@contextlib.contextmanager
def _about(path: pathlib.Path):
  """Complaints about a file without its path, which a list has already."""
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
