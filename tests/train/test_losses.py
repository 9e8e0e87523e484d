"""Losses against plain numpy, and what each of them is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.train import losses


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  x, y = rng.uniform(-1, 1, (2, 2, 3, 16, 20, 3)).astype(np.float32)
  return x, y


def test_means_and_psnr(pair):
  x, y = pair
  d = x.astype(np.float64) - y
  np.testing.assert_allclose(losses.l1(x, y), np.abs(d).mean(), rtol=1e-6)
  np.testing.assert_allclose(losses.mse(x, y), (d**2).mean(), rtol=1e-6)
  expected = 10 * np.log10(4 / (d**2).mean((1, 2, 3, 4)))
  np.testing.assert_allclose(losses.psnr(x, y), expected, rtol=1e-6)
  assert losses.psnr(x, x).min() > 99


def test_ssim_against_windows_one_by_one(pair):
  x, y = (a[:1, :1, :, :, :1].astype(np.float64) for a in pair)
  values = []
  for i in range(16 - 7 + 1):
    for j in range(20 - 7 + 1):
      p, q = (a[0, 0, i : i + 7, j : j + 7, 0] for a in (x, y))
      c1, c2 = 0.0004, 0.0036
      cov = ((p - p.mean()) * (q - q.mean())).mean()
      values.append(
        (2 * p.mean() * q.mean() + c1)
        * (2 * cov + c2)
        / (p.mean() ** 2 + q.mean() ** 2 + c1)
        / (p.var() + q.var() + c2)
      )
  found = losses.ssim(jnp.float32(x), jnp.float32(y))
  np.testing.assert_allclose(found, np.mean(values), atol=2e-5)
  np.testing.assert_allclose(losses.dssim(*map(jnp.float32, (x, x))), 0, atol=0)


def test_gradient_against_numpy_at_one_scale(pair):
  x, y = pair
  d = x - y
  expected = sum(np.abs(np.diff(d, axis=a)).mean() for a in (1, 2, 3))
  found = losses.gradient(x, y, scales=1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradient_ignores_brightness_and_sees_coarse_structure(pair):
  x, _ = pair
  assert float(losses.gradient(x, x + 0.5)) < 1e-6
  coarse = np.zeros_like(x)
  coarse[:, :, 8:] = 0.5
  one, three = (float(losses.gradient(x, x + coarse, n)) for n in (1, 3))
  assert three > 1.5 * one


def test_wavelet_against_filters_one_by_one(pair):
  """Each sub-band is a product of three filters, orthonormal together."""
  x, y = (a[:, :2, :6, :4].astype(np.float64) for a in pair)
  filters = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
  coefficients = []
  for bands in np.ndindex(2, 2, 2):
    t, h, w = (filters[band] for band in bands)
    for i in range(3):
      for j in range(2):
        cut = (x - y)[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        found = np.einsum("bthwc,t,h,w->bc", cut, t, h, w)
        coefficients.append(np.abs(found))
  found = losses.wavelet(jnp.float32(x), jnp.float32(y))
  np.testing.assert_allclose(found, np.mean(coefficients), rtol=1e-5)
  # An odd last frame is left out, and a single frame is not transformed.
  odd = [jnp.float32(np.concatenate([a, a[:, :1]], axis=1)) for a in (x, y)]
  np.testing.assert_allclose(losses.wavelet(*odd), found, rtol=1e-6)
  one = losses.wavelet(jnp.zeros((1, 1, 2, 2, 1)), jnp.ones((1, 1, 2, 2, 1)))
  assert float(one) == pytest.approx(0.5)


@pytest.mark.parametrize("term", [*losses.TERMS])
def test_terms_are_finite_and_pull_towards_the_target(pair, term):
  x, y = pair
  term_of = jax.jit(losses.TERMS[term])
  loss, pull = jax.jit(jax.value_and_grad(losses.TERMS[term]))(x, y)
  assert np.isfinite(loss) and np.isfinite(pull).all()
  assert term_of(x - 0.1 * pull / np.abs(pull).max(), y) < loss
  assert float(term_of(x, x)) < 1e-6


def test_weighted_sums_in_float32(pair):
  x, y = (jnp.asarray(a, jnp.bfloat16) for a in pair)
  total, terms = losses.weighted(x, y, {"l1": 2.0, "mse": 0.0, "dssim": 0.5})
  assert set(terms) == {"l1", "dssim"} and total.dtype == jnp.float32
  expected = 2 * terms["l1"] + 0.5 * terms["dssim"]
  np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [{"l2": 1.0}, {"l1": 0.0}, {}])
def test_weights_that_mean_nothing(pair, weights):
  with pytest.raises(errors.UserError, match="l1, mse"):
    losses.weighted(*map(jnp.asarray, pair), weights)
