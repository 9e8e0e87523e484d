"""Small videos for the tests."""

import av
import numpy as np

from dcvideogen_jax.data import video


def clip(frames=12, height=48, width=64, seed=0):
  """Returns a smooth moving pattern, which video coding hardly changes."""
  rng = np.random.default_rng(seed)
  fy, fx, phase = rng.uniform(0.1, 0.25, 3), rng.uniform(0.1, 0.25, 3), 2.0
  t, y, x = np.ogrid[:frames, :height, :width]
  t, y, x = (a[..., None] for a in (t, y, x))
  wave_ = np.sin(y * fy + x * fx + 0.3 * t + phase * np.arange(3))
  return (127 + 100 * wave_).astype(np.uint8)


def write(path, frames, **options):
  with video.VideoWriter(path, **options) as writer:
    writer.write(frames)
  return path


def read(path, **options):
  return np.stack(list(video.read_frames(path, **options)))


def encode(path, frames, height=32, width=32, codec="libx264", **options):
  """Writes a video of noise in any container."""
  rng = np.random.default_rng(0)
  with av.open(str(path), "w", **options) as container:
    stream = container.add_stream(codec, rate=16)
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv420p"
    for array in rng.integers(0, 256, (frames, height, width, 3), np.uint8):
      frame = av.VideoFrame.from_ndarray(array, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
