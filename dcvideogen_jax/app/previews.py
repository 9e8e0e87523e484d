"""A video that grows chunk by chunk and can be looked at meanwhile."""

import pathlib

import av
import numpy as np

from dcvideogen_jax.data import video
from dcvideogen_jax.sample import generation

_CRF = 20


class GrowingVideo:
  """Writes, after each chunk, a video of all chunks so far.

  Each chunk is encoded once. A browser that still reads the file before is not
  disturbed, because each file has another name.

  Attributes:
    frames: number of frames so far.
  """

  def __init__(self, directory: pathlib.Path):
    """Begins a video without frames.

    Args:
      directory: gets the files; whoever makes it also removes it.
    """
    self.frames = 0
    self._directory = directory
    self._pieces: list[tuple[int, pathlib.Path]] = []

  def add(self, frames: np.ndarray) -> pathlib.Path:
    """Appends frames, uint8 (t, h, w, 3); returns the video of all so far."""
    number = len(self._pieces)
    piece = self._directory / f"piece{number}.mp4"
    with video.VideoWriter(piece, fps=generation.FPS, crf=_CRF) as writer:
      writer.write(frames)
    self._pieces.append((self.frames, piece))
    self.frames += len(frames)
    path = self._directory / f"video{number}.mp4"
    self._join(path)
    (self._directory / f"video{number - 2}.mp4").unlink(missing_ok=True)
    return path

  def _join(self, path: pathlib.Path) -> None:
    """Copies the packets of all pieces into one file."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as joined:
      stream = None
      for first, piece in self._pieces:
        with av.open(str(piece)) as source:
          (given,) = source.streams.video
          if stream is None:
            stream = joined.add_stream_from_template(given)
            stream.time_base = given.time_base
          late = round(first / generation.FPS / given.time_base)
          for packet in source.demux(given):
            if packet.dts is not None:
              packet.pts += late
              packet.dts += late
              packet.stream = stream
              joined.mux(packet)
