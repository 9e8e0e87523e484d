"""Resamples videos to another frame rate, by the times of their frames.

Wan 2.1 and DC-VideoGen generate 16 frames per second, and their training clips
must move at the same speed. The k-th frame of the result is the frame of the
file that begins nearest to k / fps seconds; of two that are equally near, the
earlier one. A file with a lower frame rate therefore repeats frames, as with
FFmpeg's filter "fps". The official training does not resample.
"""

import warnings
from collections.abc import Iterator

from dcvideogen_jax import errors
from dcvideogen_jax.data import video

FPS = 16.0  # Frames per second of the models' videos.
# In seconds. Containers round times to milliseconds, which must not decide
# between two frames that are equally near.
_ROUNDING = 1e-3
# A warning tells of repeated frames if a file has less than this share of the
# frame rate asked for.
_FEWER = 0.99


def parse(text: str, name: str) -> float | None:
  """Parses a frame rate; "file", the file's own frame rate, gives None.

  Raises:
    errors.UserError: if the text is neither; the message begins with `name`.
  """
  try:
    fps = None if text == "file" else float(text)
  except ValueError:
    fps = 0.0
  require(fps, name, text)
  return fps


def require(fps: float | None, name: str, found: object = None) -> None:
  """Checks that a frame rate is None or a number from 0.1 to 1000.

  Args:
    fps: frames per second.
    name: name of the option, with which the message begins.
    found: the value to quote in the message, if it is not `fps`.

  Raises:
    errors.UserError: if the frame rate is neither.
  """
  number = isinstance(fps, int | float) and not isinstance(fps, bool)
  if fps is not None and not (number and 0.1 <= fps <= 1000):
    raise errors.UserError(
      f"{name} must be frames per second, from 0.1 to 1000, or the file's own, "
      f"found {fps if found is None else found!r}"
    )


def count(info: video.VideoInfo, fps: float | None) -> int:
  """Returns how many frames a video has at `fps`; None keeps its own rate."""
  if fps is None or not info.fps:
    return info.frames
  return max(1, int(info.seconds * fps + 0.5))


def frames(
  path, info: video.VideoInfo, fps: float | None
) -> Iterator[video.Frame]:
  """Yields a video's frames at `fps`; a repeated frame is the same object.

  Args:
    path: path of the video file.
    info: the result of `video.probe` for the file.
    fps: frames per second. All frames of the file are given if this is None or
      if the file's own frame rate is unknown.

  Raises:
    errors.UserError: as `video.frames`.
  """
  decoded = video.frames(path)
  if fps is None or not info.fps:
    yield from decoded
    return
  taken, last = 0, next(decoded)
  for frame in decoded:
    # Up to the middle between two frames, the earlier one is nearest.
    until = (last.seconds + frame.seconds) / 2 + _ROUNDING
    while taken / fps <= until:
      yield last
      taken += 1
    last = frame
  # Ends at the number of frames that `count` gives, if `info` is right about
  # the file.
  until = last.seconds + 1 / info.fps
  while taken < max(1, int(until * fps + 0.5)):
    yield last
    taken += 1


def repeats(has: float, fps: float | None) -> bool:
  """Returns whether frames repeat if a file with rate `has` is given `fps`."""
  return fps is not None and 0 < has < _FEWER * fps


def rate(info: video.VideoInfo, fps: float | None) -> str:
  """Returns " at 16 per second", or "" if `fps` keeps the number of frames."""
  same = count(info, fps) == info.frames
  return "" if same else f" at {fps:g} per second"


def tell(file: str, info: video.VideoInfo, fps: float | None) -> None:
  """Warns if frames of a file are repeated or its frame rate is unknown.

  Args:
    file: name of the file in the message.
    info: the result of `video.probe` for the file.
    fps: frames per second asked for; None gives no warning.
  """
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
