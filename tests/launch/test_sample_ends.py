"""How a video ends when fewer frames come than were asked for."""

import types

import numpy as np
import pytest

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax.sample import request_list, results, sizes

FRAMES = 8


def _write(tmp_path, interrupted, due=2 * FRAMES):
  """Writes a chunk of `FRAMES` frames where `due` are asked for."""
  pixels = np.random.default_rng(0).integers(0, 256, (1, FRAMES, 32, 32, 3))
  size = sizes.Size(due, 32, 32)
  result = types.SimpleNamespace(
    settings={}, size=size, chunks=lambda i: iter([pixels.astype(np.uint8)])
  )
  request = request_list.Request("a ball", None, None, None, 0)
  results.write(
    tmp_path / "made",
    request,
    result,
    clock_lib.Clock(),
    settings={},
    interrupted=lambda: interrupted,
  )


def test_ctrl_c_is_an_interruption(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path, True)
  assert (tmp_path / "made.mp4").exists()


def test_ctrl_c_in_the_last_chunk_changes_nothing(tmp_path, capsys):
  _write(tmp_path, True, FRAMES)
  assert ", write " in capsys.readouterr().out


def test_a_short_video_is_none(tmp_path):
  with pytest.raises(RuntimeError, match="fewer frames"):
    _write(tmp_path, False)
