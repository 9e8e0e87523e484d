"""Generated motion: reproducible, moving, anti-aliased, varied."""

import time

import numpy as np
import pytest

from dcvideogen_jax.tiny import synthetic


@pytest.mark.parametrize("size", [(16, 64, 64), (5, 32, 96), (1, 17, 9)])
def test_clip_shape_and_seed(size):
  one = synthetic.clip(7, *size)
  assert one.shape == (*size, 3) and one.dtype == np.uint8
  assert one.flags.c_contiguous
  np.testing.assert_array_equal(one, synthetic.clip(7, *size))
  assert (one != synthetic.clip(8, *size)).any()


def test_the_global_seed_has_no_say():
  np.random.seed(0)
  one = synthetic.clip(3, 4, 32, 32)
  np.random.seed(1)
  np.testing.assert_array_equal(one, synthetic.clip(3, 4, 32, 32))


def test_clips_move_and_differ():
  clips = [synthetic.clip(seed, 16, 48, 48).astype(int) for seed in range(40)]
  changes = np.array([np.abs(np.diff(c, axis=0)).mean() for c in clips])
  assert (changes > 0.3).mean() > 0.95 and np.median(changes) < 30
  means = np.array([c.mean((0, 1, 2)) for c in clips])
  assert (means.std(0) > 25).all()


def test_motion_is_continuous():
  """Neighbouring frames differ less than distant ones."""
  near, far = [], []
  for seed in range(30):
    clip = synthetic.clip(seed, 12, 48, 48).astype(int)
    near.append(np.abs(clip[1:] - clip[:-1]).mean())
    far.append(np.abs(clip[8:] - clip[:-8]).mean())
  assert np.median(near) < 0.5 * np.median(far)


@pytest.mark.parametrize("name", synthetic.SHAPES)
def test_shapes_are_signed_distances(name):
  """Distances are negative inside, and their slope is 1 at the edge."""
  y, x = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j].astype(np.float32)
  distance = synthetic.SHAPES[name](x, y)
  area = (distance < 0).mean() * 9
  assert 0.7 < area < 3.3
  reach = np.hypot(x, y)[distance < 0].max()
  assert 0.95 < reach <= 1.25
  slope_y, slope_x = np.gradient(distance, 0.01)
  edge = np.abs(distance) < 0.03
  slope = np.hypot(slope_y, slope_x)[edge]
  assert np.median(slope) == pytest.approx(1, abs=0.02)


def test_shapes_have_their_symmetries():
  rng = np.random.default_rng(0)
  x, y = rng.uniform(-1.3, 1.3, (2, 500)).astype(np.float32)
  for name, turns in (
    ("triangle", 3),
    ("square", 4),
    ("cross", 4),
    ("star", 5),
    ("hexagon", 6),
  ):
    c, s = np.cos(2 * np.pi / turns), np.sin(2 * np.pi / turns)
    turned = synthetic.SHAPES[name](
      (c * x - s * y).astype(np.float32), (s * x + c * y).astype(np.float32)
    )
    np.testing.assert_allclose(
      turned, synthetic.SHAPES[name](x, y), atol=1e-5, err_msg=name
    )


def test_a_box_around_a_shape_cuts_nothing_off(monkeypatch):
  clips = [synthetic.clip(seed, 6, 64, 48) for seed in range(25)]
  monkeypatch.setattr(
    synthetic, "_reached", lambda m, r, extent: slice(0, extent)
  )
  for seed, clip in enumerate(clips):
    np.testing.assert_array_equal(clip, synthetic.clip(seed, 6, 64, 48))


def test_edges_are_anti_aliased(monkeypatch):
  """A disc on a flat background has the area of the ideal disc."""
  monkeypatch.setattr(synthetic, "SHAPES", {"circle": synthetic._circle})
  planes = np.zeros((3, 1, 64, 64), np.float32)
  monkeypatch.setattr(
    synthetic, "_path", lambda rng, frames, extent: np.full(frames, extent / 2)
  )
  monkeypatch.setattr(
    synthetic, "_colour", lambda rng: np.full((3, 1, 1, 1), 200, np.float32)
  )
  rng = np.random.default_rng(0)
  t = np.zeros((1, 1, 1), np.float32)
  y = np.arange(64, dtype=np.float32)[:, None] + 0.5
  synthetic._paint_shape(rng, planes, t, y, y[:, 0])
  radius = 64 * np.random.default_rng(0).uniform(0.06, 0.38)
  area = planes[0].sum() / 200
  assert area == pytest.approx(np.pi * radius**2, rel=0.01)
  grey = (planes[0] > 5) & (planes[0] < 195)
  assert 2 * radius < grey.sum() < 14 * radius


def test_a_clip_costs_a_few_milliseconds():
  start = time.process_time()
  for seed in range(20):
    synthetic.clip(seed, 16, 64, 64)
  assert (time.process_time() - start) / 20 < 0.04
