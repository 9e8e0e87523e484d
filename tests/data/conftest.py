"""Fixtures that several tests of this folder share."""

import numpy as np
import pytest
import recordings


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
  """Returns the path of an mp4 whose frames have enough bytes to damage."""
  rng = np.random.default_rng(3)
  frames = rng.integers(0, 256, (30, 64, 64, 3), np.uint8)
  return recordings.write(
    tmp_path_factory.mktemp("noisy") / "noisy.mp4", frames
  )
