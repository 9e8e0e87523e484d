"""Rescaled rotary positions, and rematerialisation of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.models import rope
from tests import random_weights
from tests.adapt import tiny_models


def inputs(module, shape=(1, 2, 4, 4)):
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(*shape, module.in_channels))
  text = rng.normal(size=(1, 3, module.text_width))
  return (
    jnp.asarray(latents, jnp.float32),
    jnp.asarray([300.0]),
    jnp.asarray(text, jnp.float32),
  )


def grid(monkeypatch, name, size, **changes):
  """Returns the tokens' rotary angles as (frames, rows, columns, pairs)."""
  found, angles = [], rope.angles
  monkeypatch.setattr(rope, "angles", lambda *a: found.append(a) or angles(*a))
  module = tiny_models.module(name, **changes)
  variables = tiny_models.abstract(module)
  jax.eval_shape(module.apply, variables, *inputs(module, (1, 2, size, size)))
  monkeypatch.undo()
  places, width = found[-1]
  return angles(places, width).reshape(*map(len, places), -1)


def test_a_coarse_grid_spans_that_of_the_base(monkeypatch):
  """A coarse token has the position of the first fine token that it covers."""
  fine = grid(monkeypatch, "base_t2v", 8)
  coarse = grid(monkeypatch, "deep_t2v", 2, rope_scale=(1, 2, 2))
  np.testing.assert_array_equal(coarse, fine[:, :4:2, :4:2])
  plain = grid(monkeypatch, "deep_t2v", 2)
  np.testing.assert_array_equal(plain, fine[:, :2, :2])


def test_positions_matter():
  module = tiny_models.module("deep_t2v")
  variables = tiny_models.variables(module, scale=1.0)

  def predict(**changes):
    apply = random_weights.jitted(module.clone(**changes))
    return apply(variables, *inputs(module))

  plain = predict()
  np.testing.assert_array_equal(plain, predict(rope_scale=(1.0, 1.0, 1.0)))
  assert np.abs(predict(rope_scale=(1, 2, 2)) - plain).max() > 1e-3


def test_a_policy_changes_no_gradient():
  module = tiny_models.module("deep_t2v", lora_rank=2, lora_alpha=4.0)
  variables = tiny_models.variables(module)

  def gradient(remat):
    apply = module.clone(remat=remat).apply
    return jax.jit(
      jax.grad(lambda v: jnp.square(apply(v, *inputs(module))).sum())
    )(variables)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradient("dots"),
    gradient(False),
  )


def test_policies_keep_different_things():
  module = tiny_models.module("deep_t2v")
  variables = tiny_models.abstract(module)

  def kept(remat):
    apply = module.clone(remat=remat).apply
    back = jax.eval_shape(
      lambda v: jax.vjp(lambda v: apply(v, *inputs(module)), v)[1], variables
    )
    return sum(leaf.size for leaf in jax.tree.leaves(back))

  assert kept("full") < kept("dots_no_batch") <= kept("dots") < kept(False)
  assert kept("full") == kept(True)


def test_unknown_policy():
  with pytest.raises(ValueError, match="one of full, dots, dots_no_batch"):
    tiny_models.module("deep_t2v", remat="some")
