"""Levels of pixels: one rule, the same on the host and on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import levels
from dcvideogen_jax.models import calls

QUANTISERS = [
  levels.to_uint8,
  jax.jit(levels.to_uint8),
  lambda x: calls.from_float(jnp.asarray(x), np.uint8),
]


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_levels_round_to_the_nearest_the_upper_of_two_and_clamp(quantise):
  known = np.arange(256, dtype=np.uint8)
  video = levels.to_float(known)
  assert video.dtype == np.float32 and video[[0, 255]].tolist() == [-1, 1]
  np.testing.assert_array_equal(quantise(video), known)
  edges = np.float32([-9, -1, -1 + 1.01 / 255, -1 + 0.99 / 255, 0, 1, 9])
  assert np.asarray(quantise(edges)).tolist() == [0, 0, 1, 0, 128, 255, 255]
  halfway = np.arange(-10, 11)
  found = np.asarray(quantise(np.float32(halfway / 127.5)))
  np.testing.assert_array_equal(found, 128 + halfway)
  rng = np.random.default_rng(0)
  many = rng.uniform(-1.2, 1.2, (4, 8, 8, 3)).astype(np.float32)
  exact = np.floor(np.clip(many.astype(float), -1, 1) * 127.5 + 128)
  np.testing.assert_array_equal(quantise(many), np.minimum(exact, 255))


def test_floats_stay_as_they_are():
  video = np.float16([0.25, -3])
  assert levels.to_float(video) is video
