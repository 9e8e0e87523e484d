"""What several tests of this folder read."""

import numpy as np
import pytest
import recordings


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
  """An mp4 with enough bytes per frame to damage."""
  rng = np.random.default_rng(3)
  frames = rng.integers(0, 256, (30, 64, 64, 3), np.uint8)
  return recordings.write(
    tmp_path_factory.mktemp("noisy") / "noisy.mp4", frames
  )
