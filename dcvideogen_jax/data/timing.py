"""Videos at another number of frames per second, by the times of their frames.

Wan 2.1 and DC-VideoGen show 16 frames per second, and what they are trained on
has to move as fast as what they show. The k-th frame is the one of the file
that begins nearest to k / fps seconds; of two that are equally near, the
earlier. A file with fewer frames per second so repeats frames, as FFmpeg's
filter "fps" does. The official training takes the frames as they come.
"""

import warnings
from collections.abc import Iterator

from dcvideogen_jax import errors
from dcvideogen_jax.data import video

FPS = 16.0  # of the models
# Seconds. Containers round times to milliseconds, and what is equally near
# must not become nearer by that.
_ROUNDING = 1e-3
# Below this share of the frames per second asked for, repetition is told.
_FEWER = 0.99


def parse(text: str, name: str) -> float | None:
  """A number of frames per second, or None for "file", which keeps its own.

  Raises:
    errors.UserError: if it is neither; the message begins with `name`.
  """
  try:
    fps = None if text == "file" else float(text)
  except ValueError:
    fps = 0.0
  require(fps, name, text)
  return fps


def require(fps: float | None, name: str, found: object = None) -> None:
  """Raises UserError unless it is None or a number of frames per second."""
  number = isinstance(fps, int | float) and not isinstance(fps, bool)
  if fps is not None and not (number and 0.1 <= fps <= 1000):
    raise errors.UserError(
      f"{name} must be frames per second, from 0.1 to 1000, or the file's own, "
      f"found {fps if found is None else found!r}"
    )


def count(info: video.VideoInfo, fps: float | None) -> int:
  """How many frames a video has at `fps`; None is as many as it shows."""
  if fps is None or not info.fps:
    return info.frames
  return max(1, int(info.seconds * fps + 0.5))


def frames(
  path, info: video.VideoInfo, fps: float | None
) -> Iterator[video.Frame]:
  """A video's frames at `fps`; the same object again where one is repeated.

  Args:
    path: of the file.
    info: what `video.probe` says of it.
    fps: frames per second; None, or a file that does not tell its own, gives
      the frames as they come.

  Raises:
    errors.UserError: as `video.frames`.
  """
  decoded = video.frames(path)
  if fps is None or not info.fps:
    yield from decoded
    return
  taken, last = 0, next(decoded)
  for frame in decoded:
    # From the middle between two frames on, the later one is nearer.
    until = (last.seconds + frame.seconds) / 2 + _ROUNDING
    while taken / fps <= until:
      yield last
      taken += 1
    last = frame
  # As many as `count` says, if as many are there as `info` says.
  until = last.seconds + 1 / info.fps
  while taken < max(1, int(until * fps + 0.5)):
    yield last
    taken += 1


def repeats(has: float, fps: float | None) -> bool:
  """Whether so few frames per second are repeated to give `fps`."""
  return fps is not None and 0 < has < _FEWER * fps


def rate(info: video.VideoInfo, fps: float | None) -> str:
  """ " at 16 per second", where that is another number than the file's."""
  same = count(info, fps) == info.frames
  return "" if same else f" at {fps:g} per second"


def tell(file: str, info: video.VideoInfo, fps: float | None) -> None:
  """Warns, once a file, if frames are repeated, or its rate is not known."""
  if repeats(info.fps, fps):
    warnings.warn(
      f"{file} has {info.fps:.4g} frames per second, fewer than {fps:g}: some "
      "are repeated",
      stacklevel=2,
    )
  elif fps is not None and not info.fps:
    warnings.warn(
      f"{file} does not tell how many frames per second it has: they are taken "
      f"as {fps:g}",
      stacklevel=2,
    )
