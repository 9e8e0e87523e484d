"""Reads and writes video files as uint8 RGB frames, with PyAV."""

import contextlib
import dataclasses
import fractions
import functools
import os
import pathlib
import warnings
from collections.abc import Iterator

import av
import numpy as np

from dcvideogen_jax import errors, files
from dcvideogen_jax.data import containers, decoding, pixels, stills

# Code points of ITU-T H.273.
_BT709_TAG = 1
_SRGB_TAG = 13


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """The properties of a video file.

  Attributes:
    height: displayed height in square pixels, after rotation to upright.
    width: displayed width in square pixels, after rotation to upright.
    fps: average frames per second; 0 if unknown.
    frames: number of displayed frames; frames that an edit list hides are not
      counted.
    seconds: time from the beginning of the first frame to the end of the last;
      0 if unknown.
    comment: the container's comment tag, or None.
  """

  height: int
  width: int
  fps: float
  frames: int
  seconds: float
  comment: str | None


@dataclasses.dataclass(frozen=True)
class Frame:
  """A decoded frame, which `rgb` converts to an array.

  Attributes:
    seconds: display time, counted from the first frame of the video. Times
      increase, even where a file's timestamps start anew.
    height: displayed height of the video's first frame in pixels.
    width: displayed width of the video's first frame in pixels.
    decoded: the frame as PyAV decodes it.
    geometry: how the stored picture is displayed.
  """

  seconds: float
  height: int
  width: int
  decoded: av.VideoFrame
  geometry: pixels.Geometry

  def rgb(self, size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns the upright picture: uint8 (h, w, 3), sRGB.

    Args:
      size: (height, width) to resize to (bicubic) while converting; None is
        the size of the video's first frame.
    """
    size = size or (self.height, self.width)
    return pixels.to_rgb(self.decoded, self.geometry, size)


def is_image(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file is a single image, judged by its content."""
  return stills.count(path) == 1


def probe(path: str | os.PathLike[str]) -> VideoInfo:
  """Opens a video, decodes its first frame and counts its displayed frames.

  The frames of an mp4 are counted in its index. Other files are read to their
  end without decoding.

  Raises:
    errors.UserError: as `frames`, for the part of the file that is read.
  """
  path = decoding.existing(path)
  first = next(frames(path))
  if stills.count(path):
    ends = [begin + length for begin, length, _ in stills.pictures(path)]
    fps = len(ends) / ends[-1] if ends[-1] else 0.0
    return VideoInfo(first.height, first.width, fps, len(ends), ends[-1], None)
  with decoding.opened(path) as (container, stream):
    comment = container.metadata.get("comment")
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    times = decoding.times(container, stream, path)
  if len(times) > 1 and times[-1] > times[0]:
    measured = (len(times) - 1) / (times[-1] - times[0])
    # The container's frame rate is exact if the times roughly confirm it.
    if abs(fps / measured - 1) > 0.02:
      fps = float(measured)
  elif not len(times):
    raise errors.UserError(f"{path} holds no video frames")
  seconds = float(times[-1] - times[0]) + 1 / fps if fps else 0.0
  return VideoInfo(first.height, first.width, fps, len(times), seconds, comment)


def frames(
  path: str | os.PathLike[str], *, start: float = 0.0
) -> Iterator[Frame]:
  """Yields the frames that a player displays, with their times.

  Interlaced recordings are deinterlaced by FFmpeg's bwdif, with one frame for
  each stored frame. Only a few frames are in memory at a time. Nothing is
  checked before the first frame is asked for, and damage further on raises an
  error when its frame is reached.

  Args:
    path: a video file, an animation, or an image, which is a video of one
      frame.
    start: seconds of video to skip, counted from the first frame. A frame
      that begins up to half a frame earlier is still given.

  Raises:
    errors.UserError: if the file is missing, is not a video, is truncated or
      damaged, has no video stream or no frames from `start` on, or has colours
      that cannot be converted.
  """
  path = decoding.existing(path)
  if stills.count(path):
    decoded = decoding.pictures(path, start)
  else:
    decoded = decoding.decoded(path, start)
  shown = None
  for seconds, frame, geometry in decoded:
    shown = shown or geometry.shown(frame.height, frame.width)
    yield Frame(seconds, *shown, frame, geometry)
  if shown is None:
    beyond = f" from second {start:g} on" if start > 0 else ""
    raise errors.UserError(f"{path} holds no video frames{beyond}")


def read_frames(
  path: str | os.PathLike[str],
  *,
  max_frames: int | None = None,
  size: tuple[int, int] | None = None,
  start: float = 0.0,
) -> Iterator[np.ndarray]:
  """Yields the frames of a video one by one: uint8 (h, w, 3), sRGB, upright.

  Args:
    path: as for `frames`.
    max_frames: most frames to read; None reads all.
    size: (height, width) to resize to (bicubic) while converting; None is the
      size of the first frame.
    start: seconds of video to skip, counted from the first frame.

  Raises:
    errors.UserError: as `frames`.
  """
  if max_frames is not None and max_frames <= 0:
    return
  for count, frame in enumerate(frames(path, start=start), 1):
    yield frame.rgb(size)
    if count == max_frames:
      return


class VideoWriter:
  """Writes uint8 frames to an mp4 (H.264) that appears only when complete.

  Even sizes are stored as yuv420p, which every player shows. An odd size is
  stored as yuv444p, which can represent it. crf=0 is lossless except for the
  colour conversion. Browsers and phones play neither odd sizes nor crf=0, and a
  warning says so. Colours are BT.709 and tagged as BT.709.

  Use the writer as a context manager. An exception inside leaves no file.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    fps: float | fractions.Fraction = 16,
    crf: int = 18,
    comment: str | None = None,
  ):
    """Checks the arguments; the file is opened on entering the context.

    Args:
      path: path of the mp4; its folder must exist.
      fps: frames per second, 0.001 to 1000.
      crf: x264's constant rate factor, 0 (lossless except for the colour
        conversion) to 51 (worst).
      comment: text for the container's comment tag.

    Raises:
      errors.UserError: if the suffix is not .mp4, or fps or crf is out of
        range.
    """
    self._path = pathlib.Path(path)
    if self._path.suffix.lower() != ".mp4":
      raise errors.UserError(f"a video file must end in .mp4, not {path}")
    if not 0.001 <= fps <= 1000:
      raise errors.UserError(f"fps must be in [0.001, 1000], not {fps}")
    if not 0 <= crf <= 51:
      raise errors.UserError(f"crf must be in [0, 51], not {crf}")
    self._rate = fractions.Fraction(fps).limit_denominator(1001)
    self._crf = crf
    self._comment = comment
    self._count = 0

  def __enter__(self) -> "VideoWriter":
    with contextlib.ExitStack() as stack:
      self._temporary = stack.enter_context(files.atomic(self._path))
      stack.enter_context(self._writing())
      self._container = av.open(
        str(self._temporary),
        "w",
        format="mp4",
        options={"movflags": "+faststart"},
      )
      stack.callback(self._abandon)
      self._stream = None
      self._stack = stack.pop_all()
    return self

  def write(self, frames: np.ndarray) -> None:
    """Appends frames: uint8 (n, h, w, 3), the same h and w in every call.

    Raises:
      TypeError: if the array is not uint8.
      ValueError: if its shape is not (n, h, w, 3) or h or w changes.
      errors.UserError: if the file cannot be written.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
      raise TypeError(f"video frames must be uint8, not {frames.dtype}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:3]:
      raise ValueError(f"frames must be (n, h, w, 3), not {frames.shape}")
    if not len(frames):
      return
    with self._writing():
      if self._stream is None:
        self._add_stream(*frames.shape[1:3])
      height, width = self._stream.height, self._stream.width
      if frames.shape[1:3] != (height, width):
        raise ValueError(
          f"frames of {frames.shape[1]}x{frames.shape[2]} after frames of "
          f"{height}x{width}"
        )
      for array in frames:
        frame = av.VideoFrame.from_ndarray(
          np.ascontiguousarray(array), format="rgb24"
        ).reformat(
          format=self._stream.pix_fmt,
          dst_colorspace=pixels.BT709,
          interpolation=pixels.SCALING,
        )
        frame.pts = self._count
        frame.time_base = 1 / self._rate
        self._container.mux(self._stream.encode(frame))
        self._count += 1

  def __exit__(self, kind, value, traceback) -> bool | None:
    if kind is not None:
      return self._stack.__exit__(kind, value, traceback)
    with self._stack:
      if self._stream is None:
        raise errors.UserError(f"no frames were written to {self._path}")
      self._container.mux(self._stream.encode(None))
      self._container.close()
      self._verify()
    return None

  def _add_stream(self, height: int, width: int) -> None:
    stream = self._container.add_stream("libx264", rate=self._rate)
    stream.height, stream.width = height, width
    odd = height % 2 or width % 2
    if odd or self._crf == 0:
      kind = "of an odd size" if odd else "without loss (crf 0)"
      warnings.warn(
        f"{self._path} is a video {kind}, H.264 in its profile High 4:4:4 "
        "Predictive, which browsers and phones do not play",
        stacklevel=3,
      )
    stream.pix_fmt = "yuv444p" if odd else "yuv420p"
    stream.time_base = 1 / self._rate
    stream.options = {"crf": str(self._crf), **_repeatable()}
    context = stream.codec_context
    context.colorspace = context.color_primaries = _BT709_TAG
    context.color_trc = _SRGB_TAG
    context.color_range = 1  # MPEG, 16 to 235
    context.thread_type = "AUTO"
    if self._comment is not None:
      self._container.metadata["comment"] = self._comment
    self._stream = stream

  @contextlib.contextmanager
  def _writing(self):
    """Turns errors of libav into a UserError."""
    try:
      yield
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as e:
      reason = " ".join((getattr(e, "strerror", None) or str(e)).split())
      raise errors.UserError(f"cannot write {self._path}: {reason}") from e

  def _abandon(self) -> None:
    """Closes the container after a failure, and ignores further errors."""
    with contextlib.suppress(av.FFmpegError):
      self._container.close()

  def _verify(self) -> None:
    """Reads the file back, because libav can miss that the disk is full."""
    try:
      containers.check_complete(self._temporary)
      with av.open(str(self._temporary)) as container:
        written = sum(p.size > 0 for p in container.demux(video=0))
    except (errors.UserError, av.FFmpegError, OSError):
      written = 0
    if written != self._count:
      raise errors.UserError(
        f"cannot write {self._path}: only {written} of {self._count} frames "
        "reached the disk"
      )


@functools.cache
def _repeatable() -> dict[str, str]:
  """Returns options with which x264 gives equal bytes for equal frames.

  With AVX-512, x264's macroblock tree reads uninitialised memory (x264 core
  165, in PyAV 18.1). Files of the same frames then differ by 9 levels and more,
  depending on what the process did before. Without AVX-512, the files are those
  that zeros in that memory would give.
  """
  try:
    avx512 = "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    avx512 = False  # /proc/cpuinfo exists on Linux only.
  return {"x264-params": "asm=avx2"} if avx512 else {}
