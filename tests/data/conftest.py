"""Fixtures that several tests of this folder share."""

import numpy as np
import pytest
import recordings

from dcvideogen_jax.data import video


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
  """Returns the path of an mp4 whose frames have enough bytes to damage."""
  rng = np.random.default_rng(3)
  frames = rng.integers(0, 256, (30, 64, 64, 3), np.uint8)
  return recordings.write(
    tmp_path_factory.mktemp("noisy") / "noisy.mp4", frames
  )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """Two videos, the second eleven times as long as the first."""
  path = tmp_path_factory.mktemp("videos")
  (path / "deep").mkdir()
  y, x = np.mgrid[:40, :60][..., None]
  for name, frames, offset in (("a.mp4", 16, 0), ("deep/b.mp4", 176, 200)):
    t = np.arange(frames)[:, None, None, None]
    clip = 100 + 50 * np.sin(0.2 * (x + y) + 0.1 * t + offset + np.zeros(3))
    with video.VideoWriter(path / name) as writer:
      writer.write(clip.astype(np.uint8))
  (path / "notes.txt").write_text("not a video")
  return path
