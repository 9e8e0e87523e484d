"""How `launch.sample` ends when fewer frames come than were asked for."""

import contextlib
import types

import numpy as np
import pytest
from absl import flags

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax.programs import sample, stream_flags
from dcvideogen_jax.sample import request_list, sizes

FRAMES = 8


@pytest.fixture(autouse=True, scope="module")
def parsed():
  flags.FLAGS(["sample", "--output=out", "--model=tiny"])


def _write(tmp_path):
  """Writes a chunk of `FRAMES` frames where twice as many are due."""
  pixels = np.random.default_rng(0).integers(0, 256, (1, FRAMES, 32, 32, 3))
  size = sizes.Size(2 * FRAMES, 32, 32)
  result = types.SimpleNamespace(
    settings={}, size=size, chunks=lambda i: iter([pixels.astype(np.uint8)])
  )
  request = request_list.Request("a ball", None, None, None, 0)
  sample._write(tmp_path / "made", request, result, clock_lib.Clock())


def test_ctrl_c_is_an_interruption(tmp_path, monkeypatch):
  monkeypatch.setattr(
    stream_flags,
    "interruptible",
    lambda: contextlib.nullcontext(lambda: True),
  )
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path)
  assert (tmp_path / "made.mp4").exists()


def test_a_short_video_is_none(tmp_path):
  with pytest.raises(RuntimeError, match="fewer frames"):
    _write(tmp_path)
