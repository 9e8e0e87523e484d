"""Videos and images."""

import av
import numpy as np
import PIL.Image

from dcvideogen_jax.data import stills, video
from tests.damage import reading
from tests.data import recordings

# Containers, with codecs that are met in them.
_VIDEOS = {
  "mp4": ("libx264", "yuv420p"),
  "mov": ("libx264", "yuv420p"),
  "mkv": ("libx264", "yuv420p"),
  "webm": ("libvpx-vp9", "yuv420p"),
  "avi": ("mpeg4", "yuv420p"),
  "mpg": ("mpeg2video", "yuv420p"),
  "gif": ("gif", "rgb8"),
}
_IMAGES = ("png", "jpg", "webp", "tiff", "bmp")


def _write_video(suffix):
  codec, pixels = _VIDEOS[suffix]

  def make(directory):
    with av.open(str(directory / f"clip.{suffix}"), "w") as container:
      stream = container.add_stream(codec, rate=25)
      stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
      stream.codec_context.thread_count = 1
      stream.codec_context.gop_size = 6
      for array in recordings.clip():
        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        container.mux(stream.encode(frame.reformat(format=pixels)))
      container.mux(stream.encode(None))

  return make


def _read_video(suffix):
  def read(directory):
    path = directory / f"clip.{suffix}"
    info = video.probe(path)
    frames = np.stack([*video.read_frames(path)])
    return {
      "size": np.zeros((info.height, info.width)),
      "count": np.zeros(info.frames),
      "fps": info.fps,
      "frames": frames,
    }

  return read


def _write_image(suffix):
  def make(directory):
    array = recordings.clip(1)[0]
    PIL.Image.fromarray(array).save(directory / f"still.{suffix}")

  return make


def _read_image(suffix):
  return lambda directory: {
    "pixels": stills.read(directory / f"still.{suffix}")
  }


INPUTS = (
  *(
    reading.Input(
      suffix,
      "clip.*",
      "bytes",
      _write_video(suffix),
      _read_video(suffix),
      "values",
    )
    for suffix in _VIDEOS
  ),
  *(
    reading.Input(
      suffix,
      "still.*",
      "bytes",
      _write_image(suffix),
      _read_image(suffix),
      "values",
    )
    for suffix in _IMAGES
  ),
)
