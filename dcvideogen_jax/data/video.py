"""Reading and writing video files and images as uint8 RGB arrays, on PyAV."""

import contextlib
import dataclasses
import fractions
import math
import os
import pathlib
import struct
from collections.abc import Iterator

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
from av.video import reformatter

from dcvideogen_jax import errors, files
from dcvideogen_jax.data import containers

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Without the last two, swscale repeats chroma samples instead of interpolating
# them, which is seven times as far from the picture on smooth colours.
_SCALING = (
  reformatter.Interpolation.BICUBIC
  | reformatter.Interpolation.FULL_CHR_H_INT
  | reformatter.Interpolation.ACCURATE_RND
)
# Formats in which every frame has a time of its own; in others, a frame that
# was sought may be taken for its neighbour.
_INDEXED = ("mov", "matroska")
_BT709 = reformatter.Colorspace.ITU709
_BT709_TAG = 1
_SRGB_TAG = 13


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What a video file shows.

  Attributes:
    height: pixels, as displayed (after the rotation the file asks for).
    width: pixels, as displayed.
    fps: average frames per second; 0 if the file does not tell.
    frames: number of frames that are shown; those that an edit list hides are
      not counted.
    seconds: from the beginning of the first frame to the end of the last; 0 if
      the file does not tell.
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
  """A decoded frame, which becomes an array only when that is asked for.

  Attributes:
    seconds: when it is shown, from the first frame of the video on. Later
      frames have larger numbers, also where a file's timestamps start anew.
    decoded: as PyAV has it.
  """

  seconds: float
  decoded: av.VideoFrame

  def rgb(self, size: tuple[int, int] | None = None) -> np.ndarray:
    """The upright picture: uint8 (h, w, 3), RGB.

    Args:
      size: (height, width) to resize to (bicubic) while converting.
    """
    return _to_rgb(self.decoded, size)


def is_image(path: str | os.PathLike[str]) -> bool:
  """Whether the file name ends like that of a still image."""
  return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads an image, upright, transparent parts on white: uint8 (h, w, 3).

  Raises:
    errors.UserError: if the file is missing, damaged or no image.
  """
  path = _existing(path)
  try:
    with PIL.Image.open(path) as image:
      image = PIL.ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16 bits, which "RGB" would clip
        grey = np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
      if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
      return np.array(image.convert("RGB"))
  except (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    PIL.Image.DecompressionBombError,
  ) as e:
    raise errors.UserError(
      f"{path} is not a readable image or is damaged ({_reason(e)})"
    ) from e


def probe(path: str | os.PathLike[str]) -> VideoInfo:
  """Opens a video, decodes its first frame and counts what is shown.

  The frames of an mp4 are counted in its index; other files are read to their
  end, without being decoded.

  Raises:
    errors.UserError: as `read_frames`, for the part that is looked at.
  """
  with _opened(path) as (container, stream):
    comment = container.metadata.get("comment")
    for frame in _decoded(container, stream, path):
      if frame.is_corrupt:
        raise errors.UserError(f"{path} is damaged near frame 0")
      height, width = frame.height, frame.width
      if frame.rotation % 180:
        height, width = width, height
      break
    else:
      raise errors.UserError(f"{path} holds no video frames")
  with _opened(path) as (container, stream):
    times = _times(container, stream, path)
    fps = float(stream.average_rate or stream.guessed_rate or 0)
  if len(times) > 1 and times[-1] > times[0]:
    measured = (len(times) - 1) / (times[-1] - times[0])
    # What the container says is exact, unless it is wrong.
    if abs(fps / measured - 1) > 0.02:
      fps = measured
  elif not len(times):
    raise errors.UserError(f"{path} holds no video frames")
  seconds = (times[-1] - times[0] + 1 / fps) if fps else 0.0
  return VideoInfo(height, width, fps, len(times), seconds, comment)


def frames(
  path: str | os.PathLike[str], *, start: float = 0.0
) -> Iterator[Frame]:
  """Yields the frames that a player shows, with their times.

  Only a few frames are in memory at a time. Errors come at the frame where
  the damage is met, the first of them at the first frame asked for.

  Args:
    path: a video file, or an image, which is a video of one frame.
    start: seconds of video to skip, counted from the first frame. A frame
      that begins up to half a frame earlier still comes.

  Raises:
    errors.UserError: if the file is missing, is no video, is truncated or
      damaged, has no video stream or no frames from `start` on.
  """
  found = _timed(path, start, seek=start > 0)
  first = next(found, None)
  if first is None and start > 0:
    # Without an index, and with leading pictures that need the frames before
    # the key frame, the way there is from the beginning.
    found = _timed(path, start, seek=False)
    first = next(found, None)
  if first is None:
    beyond = f" from second {start:g} on" if start > 0 else ""
    raise errors.UserError(f"{path} holds no video frames{beyond}")
  yield first
  yield from found


def read_frames(
  path: str | os.PathLike[str],
  *,
  max_frames: int | None = None,
  size: tuple[int, int] | None = None,
  start: float = 0.0,
) -> Iterator[np.ndarray]:
  """Yields the frames of a video one by one: uint8 (h, w, 3), RGB, upright.

  Args:
    path: a video file, or an image, which is a video of one frame.
    max_frames: stop after so many frames.
    size: (height, width) to resize to (bicubic) while converting.
    start: seconds of video to skip, counted from the first frame.

  Raises:
    errors.UserError: as `frames`.
  """
  if max_frames is not None and max_frames <= 0:
    return
  for count, frame in enumerate(frames(path, start=start), 1):
    array = frame.rgb(size)
    # A stream may change its size midway; the first frame's counts.
    size = array.shape[:2]
    yield array
    if count == max_frames:
      return


class VideoWriter:
  """Writes uint8 frames to an mp4 (H.264) that appears only when complete.

  Even sizes are stored as yuv420p, which every player shows; odd ones as
  yuv444p, which keeps their size. Colours are BT.709, tagged as such.

  Use as a context manager; an exception inside leaves no file.
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
      path: where the mp4 goes; its folder must exist.
      fps: frames per second.
      crf: x264's quality, 0 (lossless but for colour conversion) to 51.
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
          dst_colorspace=_BT709,
          interpolation=_SCALING,
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
    stream.pix_fmt = "yuv444p" if odd else "yuv420p"
    stream.time_base = 1 / self._rate
    stream.options = {"crf": str(self._crf)}
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
    """Turns libav's complaints into one sentence."""
    try:
      yield
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as e:
      raise errors.UserError(f"cannot write {self._path}: {_reason(e)}") from e

  def _abandon(self) -> None:
    """Closes the container; after a failure, what closing says is noise."""
    with contextlib.suppress(av.FFmpegError):
      self._container.close()

  def _verify(self) -> None:
    """A full disk can go unnoticed by libav, so the result is read back."""
    try:
      with _opened(self._temporary) as (container, stream):
        found = sum(p.size > 0 for p in container.demux(stream))
    except (errors.UserError, av.FFmpegError):
      found = 0
    if found != self._count:
      raise errors.UserError(
        f"cannot write {self._path}: only {found} of {self._count} frames "
        "reached the disk"
      )


def _reason(error: Exception) -> str:
  """What went wrong, without libav's numbers and file names."""
  text = getattr(error, "strerror", None) or str(error)
  return " ".join(text.split()) or type(error).__name__


def _existing(path: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"{path} does not exist")
  if not path.is_file():
    raise errors.UserError(f"{path} is not a file")
  return path


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]):
  """Yields (container, first real video stream)."""
  path = _existing(path)
  try:
    containers.check_complete(path)
    container = av.open(str(path))
  except (av.FFmpegError, OSError) as e:
    raise errors.UserError(
      f"{path} is not a readable video or is damaged ({_reason(e)})"
    ) from e
  with container:
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams or streams[0].codec_context is None:
      raise errors.UserError(f"{path} has no video stream that can be decoded")
    # With a thread per frame, FFmpeg sometimes hands a frame out before the
    # thread that decodes it has flagged it as damaged.
    streams[0].thread_type = "SLICE"
    yield container, streams[0]


def _times(container, stream, path) -> np.ndarray:
  """When the packets that are shown begin, in seconds, sorted.

  Raises:
    errors.UserError: if the file cannot be read to its end.
  """
  base = float(stream.time_base or 0)
  index = []
  if container.format.name.startswith("mov") and not containers.fragmented(
    path
  ):
    # Times of decoding, which differ from those of showing by a constant.
    index = [
      (e.timestamp, e.size) for e in stream.index_entries if not e.is_discard
    ]
  else:
    try:
      for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
          time = packet.dts if packet.pts is None else packet.pts
          index.append((time, packet.size))
    except av.FFmpegError as e:
      raise errors.UserError(f"{path} is damaged ({_reason(e)})") from e
  index = [time for time, size in index if size > 0]
  period = 1 / float((stream.average_rate or 16) * (stream.time_base or 1))
  if any(time is None for time in index):
    index = [i * period for i in range(len(index))]
  return np.sort(np.array(index, float)) * base


def _timed(path, start: float, seek: bool) -> Iterator[Frame]:
  """Yields intact frames from `start` seconds on.

  With `seek`, none if that does not lead to a key frame before `start`.
  """
  with _opened(path) as (container, stream):
    period = 1 / float(stream.average_rate or 1000)
    decoded = _decoded(container, stream, path)
    zero = None
    if seek:
      first = next(decoded, None)
      indexed = container.format.name.startswith(_INDEXED)
      if not indexed or first is None or first.time is None:
        return
      zero = first.time
      try:
        offset = math.floor((zero + start) / stream.time_base)
        container.seek(offset, stream=stream)
      except av.FFmpegError:
        return
      decoded = _decoded(container, stream, path)
    index, shift, last = 0, 0.0, None
    for frame in decoded:
      time = frame.time
      if time is None:
        time = 0.0 if last is None else last + period
      zero = time if zero is None else zero
      time += shift - zero
      if last is not None and time <= last:
        shift += last + period - time
        time = last + period
      if seek and last is None and time > start + period / 2:
        return
      last = time
      if start > 0 and time < start - period / 2:
        continue
      if frame.is_corrupt:
        raise errors.UserError(f"{path} is damaged near frame {index}")
      yield Frame(time, frame)
      index += 1


def _decoded(container, stream, path) -> Iterator[av.VideoFrame]:
  """Yields frames; after seeking, the first of them may be corrupt."""
  index = 0
  try:
    for packet in container.demux(stream):
      for frame in packet.decode():
        yield frame
        index += 1
  except av.FFmpegError as e:
    raise errors.UserError(
      f"{path} is damaged near frame {index} ({_reason(e)})"
    ) from e


def _to_rgb(frame, size: tuple[int, int] | None) -> np.ndarray:
  turns = round(frame.rotation / 90)
  height, width = size or (None, None)
  if turns % 2:
    height, width = width, height
  array = frame.to_ndarray(
    format="rgb24",
    height=height,
    width=width,
    interpolation=_SCALING,
    threads=2,
  )
  return np.ascontiguousarray(np.rot90(array, turns)) if turns % 4 else array
