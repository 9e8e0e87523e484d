"""Noise levels of training, the official ones against golden tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow, training
from tests import golden_data

TABLES = json.loads((golden_data.GOLDEN / "adapt" / "adapt.json").read_text())
UNIFORM = {"draw": "uniform", "shift": 8.0, "weighted": True}
COUNT = 200_000


def drawn(count=COUNT, seed=0, **changes):
  """Levels as float64."""
  found = training.levels(jax.random.key(seed), count, UNIFORM | changes)
  assert all(x.dtype == jnp.float32 and x.shape == (count,) for x in found)
  return training.Levels(*(np.asarray(x, np.float64) for x in found))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_official_tables(task):
  table = TABLES[task]
  grid = training.official_grid(table["shift"])
  assert grid.sigmas.dtype == grid.weights.dtype == np.float32
  np.testing.assert_array_equal(grid.sigmas, np.float32(table["sigmas"]))
  np.testing.assert_allclose(grid.weights, table["weights"], atol=1e-6)
  np.testing.assert_array_equal(grid.nearest, table["grid_index_of_t"])


@pytest.mark.parametrize(
  ("task", "median", "lowest", "share", "weight", "highest", "gap"),
  [
    ("t2v", 0.52, 0.140, 0.196, 1.64, 2.47, 0.14),
    ("i2v", 0.49, 0.093, 0.133, 1.34, 2.08, 0.09),
  ],
)
def test_official_draw(task, median, lowest, share, weight, highest, gap):
  table = TABLES[task]
  found = drawn(draw="official", shift=table["shift"])
  index = np.asarray(table["grid_index_of_t"])[found.timestep.astype(int)]
  np.testing.assert_array_equal(found.timestep, np.round(found.timestep))
  assert (found.timestep.min(), found.timestep.max()) == (0, 999)
  np.testing.assert_allclose(
    found.sigma, np.asarray(table["sigmas"])[index], rtol=1e-6
  )
  np.testing.assert_allclose(
    found.weight, np.asarray(table["weights"])[index], atol=1e-6
  )
  assert np.median(found.sigma) == pytest.approx(median, abs=0.015)
  assert found.sigma.min() == pytest.approx(lowest, abs=1e-3)
  smallest = found.sigma == found.sigma.min()
  assert smallest.mean() == pytest.approx(share, abs=0.004)
  assert found.weight.mean() == pytest.approx(weight, abs=0.01)
  assert found.weight.max() == pytest.approx(highest, abs=0.01)
  off = np.abs(found.timestep / 1000 - found.sigma).max()
  assert off == pytest.approx(gap, abs=0.005)
  np.testing.assert_array_equal(found.weight[found.sigma == 1], 0)


@pytest.mark.parametrize(
  ("draw", "shift", "median"),
  [
    ("uniform", 8.0, 0.5),
    ("shifted", 8.0, 0.89),
    ("shifted", 5.0, 0.83),
    ("shifted", 1.0, 0.5),
  ],
)
def test_continuous_draws_are_consistent(draw, shift, median):
  found = drawn(draw=draw, shift=shift)
  assert 0 < found.sigma.min() < 1e-3 and found.sigma.max() <= 1
  assert np.median(found.sigma) == pytest.approx(median, abs=0.01)
  np.testing.assert_allclose(found.timestep, 1000 * found.sigma, rtol=1e-6)
  assert found.weight.mean() == pytest.approx(1, abs=0.01)
  np.testing.assert_allclose(found.weight[found.sigma > 0.99999], 0, atol=1e-3)
  bump = np.exp(-2 * ((found.timestep - 500) / 1000) ** 2) - np.exp(-0.5)
  ratio = found.weight[bump > 0.01] / bump[bump > 0.01]
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_the_default_is_the_official_draw_without_a_grid(monkeypatch):
  """On a fine grid the weights agree too, but for their scale."""
  monkeypatch.setattr(training, "_STEPS", 20_000)
  grid = training.official_grid.__wrapped__(1.0)
  sigmas = grid.sigmas[grid.nearest[1:]]
  np.testing.assert_allclose(sigmas, np.arange(1, 1000) / 1000, atol=1e-4)
  lowest, mean = training._scale(1.0)
  weights = (np.exp(-2 * (grid.sigmas - 0.5) ** 2) - lowest) / mean
  np.testing.assert_allclose(grid.weights, weights, atol=1e-3)


def test_unweighted_levels_are_the_same_levels():
  for draw in training.DRAWS:
    weighted, plain = (drawn(64, draw=draw, weighted=w) for w in (True, False))
    np.testing.assert_array_equal(weighted.sigma, plain.sigma)
    np.testing.assert_array_equal(plain.weight, 1)
    assert (drawn(64, seed=1, draw=draw).sigma != plain.sigma).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"draw": "cosine"}, "one of uniform, shifted, official, found 'cosine'"),
    ({"shift": 0.0}, "must be positive, found 0.0"),
    ({"shift": "high"}, "must be positive, found 'high'"),
    ({"shift": float("nan")}, "must be positive"),
    ({"mean": 0.0}, "exactly the keys draw, shift, weighted"),
  ],
)
def test_levels_that_make_no_sense(change, message):
  with pytest.raises(errors.UserError, match=message):
    training.levels(jax.random.key(0), 2, UNIFORM | change)


def test_squared_error_is_in_float32():
  rng = np.random.default_rng(0)
  x0, noise, v = rng.normal(size=(3, 2, 3, 4, 4, 8)).astype(np.float32)
  half = v.astype(jnp.bfloat16)
  found = training.squared_error(half, x0, noise)
  expected = np.square(half.astype(np.float64) - (noise - x0.astype(float)))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected.mean((1, 2, 3, 4)), rtol=1e-5)
  exact = training.squared_error(flow.velocity(x0, noise), x0, noise)
  np.testing.assert_array_equal(exact, 0)
