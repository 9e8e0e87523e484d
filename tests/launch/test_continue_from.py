"""The frames of a video that a stream goes on from."""

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import video
from dcvideogen_jax.sample import continuation, sizes


def _read(path, fps, per_chunk=4):
  size = sizes.Size(8, 32, 32)
  return continuation.frames(str(path), fps, size, per_chunk, None)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
  """20 frames at 32 per second; the n-th has the grey level 10 n."""
  path = tmp_path_factory.mktemp("fast") / "a.mp4"
  levels = 10 * np.arange(20, dtype=np.uint8)[:, None, None, None]
  with video.VideoWriter(path, fps=32) as writer:
    writer.write(np.broadcast_to(levels, (20, 48, 64, 3)))
  return path


def test_frames_are_taken_at_16_per_second(fast):
  """10 of them, of which two chunks of 4 are left."""
  found = _read(fast, 16)
  assert found.shape == (8, 32, 32, 3)
  levels = found.mean((1, 2, 3))
  np.testing.assert_allclose(levels, 20 * np.arange(2, 10), atol=3)


def test_or_as_they_come(fast):
  found = _read(fast, None).mean((1, 2, 3))
  np.testing.assert_allclose(found, 10 * np.arange(20), atol=3)
  words = "10 frames at 16 per second, fewer than the 12 of a chunk"
  with pytest.raises(errors.UserError, match=words):
    _read(fast, 16, per_chunk=12)
