"""Decodes video files: which frames are displayed, and at which times."""

import contextlib
import math
import os
import pathlib
import warnings
from collections.abc import Iterator

import av
import numpy as np
from av import filter as av_filter

from dcvideogen_jax import errors
from dcvideogen_jax.data import containers, pixels, stills

# Formats that store the time of every frame. Seeking in other formats may give
# a frame the time of its neighbour.
_INDEXED = ("mov", "matroska")
# PyAV before 19 raises an error for metadata tags that are not valid text,
# unless it is told to replace them.
_ANY_TAGS = (
  {"metadata_errors": "replace"}
  if int(av.__version__.split(".")[0]) < 19
  else {}
)
# Smallest height and width in pixels that FFmpeg's deinterlacer accepts.
_LEAST_INTERLACED = 16
# FFmpeg's decoders of text art, which it also uses for any .txt file.
_TEXT = ("ansi", "bintext", "xbin", "idf")
# In choosing a stream, the default flag counts as much as this many pixels.
_MARKED = 5_000_000

# The time in seconds from the first frame of the video, the frame, and how the
# frame is displayed.
Decoded = tuple[float, av.VideoFrame, pixels.Geometry]


def _reason(error: Exception) -> str:
  """Returns the message of an error without libav's numbers and file names."""
  text = getattr(error, "strerror", None) or str(error)
  return " ".join(text.split()) or type(error).__name__


def existing(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of an existing file.

  Raises:
    errors.UserError: if the path does not exist or is not a file.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"{path} does not exist")
  if not path.is_file():
    raise errors.UserError(f"{path} is not a file")
  return path


def _warn(path: pathlib.Path, what: str) -> None:
  warnings.warn(f"{path} {what}", stacklevel=4)


@contextlib.contextmanager
def opened(path: pathlib.Path):
  """Opens a video; yields the container and the stream that players show.

  Raises:
    errors.UserError: if the file is truncated, damaged or not a video.
  """
  try:
    containers.check_complete(path)
    # Metadata tags do not matter here, and may be in any encoding.
    container = av.open(str(path), **_ANY_TAGS)
  except (av.FFmpegError, OSError) as e:
    raise errors.UserError(
      f"{path} is not a readable video or is damaged ({_reason(e)})"
    ) from e
  with container:
    stream = _chosen(container, path)
    # Where the media box of an mp4 gives no size, the index tells its end.
    length = path.stat().st_size
    if container.format.name.startswith("mov") and len(stream.index_entries):
      last = stream.index_entries[-1]
      if last.pos + last.size > length:
        raise errors.UserError(
          f"{path} is truncated: it should have {last.pos + last.size} bytes "
          f"at least and has {length}"
        )
    # With a thread per frame, FFmpeg sometimes returns a damaged frame before
    # the decoding thread has flagged it.
    stream.thread_type = "SLICE"
    # Without this, some decoders conceal damage instead of reporting it.
    stream.codec_context.options = {"err_detect": "explode"}
    yield container, stream


def _chosen(container, path) -> av.VideoStream:
  """Chooses a stream as FFmpeg does: the largest, preferring a default flag."""
  flags = av.stream.Disposition
  streams = [
    s
    for s in container.streams.video
    if not s.disposition & flags.attached_pic and s.codec_context is not None
  ]
  if not streams:
    raise errors.UserError(f"{path} has no video stream that can be decoded")

  def rank(stream):
    marked = bool(stream.disposition & flags.default)
    return stream.codec_context.width * stream.codec_context.height + (
      _MARKED * marked
    )

  chosen = max(streams, key=rank)
  if chosen.codec_context.name in _TEXT:
    raise errors.UserError(
      f"{path} is text, which FFmpeg would draw as a video: expected a video "
      "or an image"
    )
  if len(streams) > 1:
    _warn(
      path,
      f"has {len(streams)} video streams, of which stream {chosen.index} is "
      "read",
    )
  if chosen.metadata.get("alpha_mode") == "1":
    _warn(path, "is partly transparent, which is not read")
  return chosen


def times(container, stream, path) -> np.ndarray:
  """Returns the sorted times in seconds at which displayed packets begin.

  Args:
    container: an open container.
    stream: the video stream of the container.
    path: path of the file.

  Raises:
    errors.UserError: if the file cannot be read to its end.
  """
  base = float(stream.time_base or 0)
  period = 1 / float((stream.average_rate or 16) * (stream.time_base or 1))
  index = []
  if container.format.name.startswith("mov") and not containers.fragmented(
    path
  ):
    # These are decoding times. Once sorted, they differ from display times by a
    # constant.
    index = [
      (e.timestamp, e.size) for e in stream.index_entries if not e.is_discard
    ]
  else:
    if container.format.name.startswith("matroska"):
      containers.check_clusters(path)
    hidden = stream.codec_context.name == "vp8"
    last, shift = None, 0.0
    try:
      for packet in container.demux(stream):
        if hidden and packet.size and not bytes(packet)[0] & 0x10:
          continue  # A frame that is not displayed (RFC 6386, section 9.1).
        if packet.size and packet.dts is not None:
          # In concatenated files the timestamps start anew.
          if last is not None and packet.dts < last:
            shift += last + period - packet.dts
          last = packet.dts
        if packet.size and not packet.is_discard:
          time = packet.dts if packet.pts is None else packet.pts
          time = None if time is None else time + shift
          index.append((time, packet.size))
    except av.FFmpegError as e:
      raise errors.UserError(f"{path} is damaged ({_reason(e)})") from e
  index = [time for time, size in index if size > 0]
  if any(time is None for time in index):
    index = [i * period for i in range(len(index))]
  return np.sort(np.array(index, float)) * base


def pictures(path: pathlib.Path, start: float) -> Iterator[Decoded]:
  """Yields the pictures of an image file from `start` seconds on."""
  for seconds, length, array in stills.pictures(path):
    if seconds >= start or seconds + length / 2 > start:
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      yield seconds, frame, pixels.geometry(frame, None)


def decoded(path: pathlib.Path, start: float) -> Iterator[Decoded]:
  """Yields the displayed frames from `start` seconds on, possibly none."""
  frames = _timed(path, start, seek=start > 0)
  first = next(frames, None)
  if first is None and start > 0:
    # Seeking fails without an index, and where leading pictures need frames
    # before the key frame. Decoding then starts at the beginning.
    frames = _timed(path, start, seek=False)
    first = next(frames, None)
  if first is not None:
    yield first
    yield from frames


def _timed(path: pathlib.Path, start: float, seek: bool) -> Iterator[Decoded]:
  """Yields intact frames from `start` seconds on.

  With `seek`, yields nothing if seeking does not lead to a key frame before
  `start`.
  """
  with opened(path) as (container, stream):
    period = 1 / float(stream.average_rate or 1000)
    aspect = stream.sample_aspect_ratio
    frames = _decoded(container, stream, path)
    zero = None
    if seek:
      first = next(frames, None)
      indexed = container.format.name.startswith(_INDEXED)
      if not indexed or first is None or first.time is None:
        return
      zero = first.time
      try:
        offset = math.floor((zero + start) / stream.time_base)
        container.seek(offset, stream=stream)
      except av.FFmpegError:
        return
      frames = _decoded(container, stream, path)
    index, shift, last, kinds = 0, 0.0, None, set()
    for frame in _deinterlaced(frames):
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
      geometry = pixels.geometry(frame, aspect)
      shown = geometry.shown(frame.height, frame.width)
      kind = (shown, frame.colorspace, frame.color_trc, frame.color_primaries)
      if kind not in kinds:
        _check(path, frame, geometry, index)
        if kinds and len({shown} | {k[0] for k in kinds}) == 2:
          _warn(
            path,
            f"changes its size at frame {index}, to {shown[0]}x{shown[1]} "
            "pixels; its frames are brought to the size of the first",
          )
        kinds.add(kind)
      yield time, frame, geometry
      index += 1


def _check(path, frame, geometry, index) -> None:
  """Refuses frames that cannot be displayed, and warns of black corners."""
  if reason := pixels.refusal(frame, geometry):
    raise errors.UserError(f"{path} {reason}")
  if geometry.angle and not index:
    _warn(
      path,
      f"is turned by {geometry.angle:g} degrees, which leaves black corners",
    )


def _decoded(container, stream, path) -> Iterator[av.VideoFrame]:
  """Yields decoded frames; after seeking, the first of them may be corrupt."""
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


def _deinterlaced(
  frames: Iterator[av.VideoFrame],
) -> Iterator[av.VideoFrame]:
  """Yields the same number of frames, with interlaced ones deinterlaced."""
  graph, fits = None, None
  for frame in frames:
    kind = (frame.width, frame.height, frame.format.name, frame.time_base)
    if graph is not None and kind != fits:
      yield from _pushed(graph, None)
      graph = None
    if (
      graph is None
      and frame.interlaced_frame
      and min(kind[:2]) >= _LEAST_INTERLACED
    ):
      graph, fits = av_filter.Graph(), kind
      source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
      )
      bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
      source.link_to(bwdif)
      bwdif.link_to(graph.add("buffersink"))
      graph.configure()
    if graph is None:
      yield frame
    else:
      yield from _pushed(graph, frame)
  if graph is not None:
    yield from _pushed(graph, None)


def _pushed(graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
  """Yields the frames that a filter returns for a frame; None ends it."""
  graph.push(frame)
  with contextlib.suppress(av.BlockingIOError, av.EOFError):
    while True:
      yield graph.pull()
