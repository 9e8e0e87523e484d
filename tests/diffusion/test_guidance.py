"""Classifier-free guidance: both forms, and no traffic between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dcvideogen_jax import sharding
from dcvideogen_jax.diffusion import guidance

WIDTH, TEXT = 4, 6


def random(*shape, seed):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def make_inputs(batch):
  """Returns x, t, cond and uncond; both conditions have the same image."""
  image = random(batch, 2, WIDTH, seed=4)
  conditions = [
    {"text": random(batch, 3, TEXT, seed=seed), "image": [image]}
    for seed in (2, 3)
  ]
  x = random(batch, 2, 3, 5, WIDTH, seed=0)
  return x, random(batch, seed=1), *conditions


def model(x, t, condition):
  """Mixes everything within a sample, and nothing between samples."""
  mixer = random(TEXT, WIDTH, seed=9)
  text = jnp.einsum("bse,ec->bc", condition["text"], mixer)
  image = condition["image"][0].mean(axis=1)
  shift = jnp.expand_dims(text + image + t[:, None], (1, 2, 3))
  keys = jnp.einsum("bthwc,bthwd->bcd", x, x)
  return jnp.tanh(jnp.einsum("bthwc,bcd->bthwd", x, keys) + shift)


class Counting:
  """Remembers what a model was called with."""

  def __init__(self):
    self.calls = []

  def __call__(self, x, t, condition):
    self.calls.append((x, t, condition))
    return model(x, t, condition)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
@pytest.mark.parametrize("batched", [True, False])
def test_goes_from_uncond_through_cond(batched, scale, batch):
  x, t, cond, uncond = make_inputs(batch)
  counting = Counting()
  found = guidance.guided(counting, scale, batched=batched)(x, t, cond, uncond)
  with_condition, without = model(x, t, cond), model(x, t, uncond)
  wanted = without + scale * (with_condition - without)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
  sizes = [len(x) for x, _, _ in counting.calls]
  assert sizes == ([2 * batch] if batched else [batch, batch])


def test_branches_of_a_sample_are_neighbours():
  x, t, cond, uncond = make_inputs(3)
  counting = Counting()
  guidance.guided(counting, 2.0)(x, t, cond, uncond)
  ((doubled, times, condition),) = counting.calls
  for i in range(3):
    np.testing.assert_array_equal(doubled[2 * i], x[i])
    np.testing.assert_array_equal(doubled[2 * i + 1], x[i])
    np.testing.assert_array_equal(times[2 * i : 2 * i + 2], [t[i], t[i]])
    np.testing.assert_array_equal(condition["text"][2 * i], cond["text"][i])
    np.testing.assert_array_equal(
      condition["text"][2 * i + 1], uncond["text"][i]
    )


@pytest.mark.parametrize("batched", [True, False])
def test_scale_1_needs_one_call_and_no_uncond(batched):
  x, t, cond, _ = make_inputs(2)
  counting = Counting()
  found = guidance.guided(counting, 1, batched=batched)(x, t, cond, None)
  assert len(counting.calls) == 1
  np.testing.assert_array_equal(found, model(x, t, cond))


@pytest.mark.parametrize("batched", [True, False])
def test_one_program_serves_every_scale(batched):
  inputs = make_inputs(2)

  @jax.jit
  def velocity(scale, *inputs):
    return guidance.guided(model, scale, batched=batched)(*inputs)

  for scale in (1.0, 4.0):
    wanted = guidance.guided(model, scale, batched=False)(*inputs)
    found = velocity(jnp.float32(scale), *inputs)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
  assert velocity._cache_size() == 1


@pytest.mark.parametrize("batched", [True, False])
def test_levels_may_differ_from_frame_to_frame(batched):
  def by_frame(x, t, condition):
    return model(x, t.mean(axis=1), condition) * jnp.expand_dims(t, (2, 3, 4))

  x, _, cond, uncond = make_inputs(2)
  t = random(2, x.shape[1], seed=5)
  found = guidance.guided(by_frame, 3.0, batched=batched)(x, t, cond, uncond)
  base = by_frame(x, t, uncond)
  wanted = base + 3 * (by_frame(x, t, cond) - base)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_second_call_waits_for_the_first():
  """XLA would embed once for both, and keep it while the first call runs."""
  velocity = guidance.guided(Counting(), 5.0, batched=False)
  jaxpr = jax.make_jaxpr(velocity)(*make_inputs(2)).jaxpr
  x, t, *_ = jaxpr.invars
  (barrier,) = (
    i for i, eqn in enumerate(jaxpr.eqns) if "barrier" in eqn.primitive.name
  )
  before, waits, after = (
    jaxpr.eqns[:barrier],
    jaxpr.eqns[barrier],
    jaxpr.eqns[barrier + 1 :],
  )
  assert waits.invars[0] is before[-1].outvars[0]
  assert [v for eqn in after for v in eqn.invars if v is x or v is t] == []


def test_combines_in_float32():
  def rounding(x, t, condition):
    return model(x, t, condition).astype(jnp.bfloat16)

  x, t, cond, uncond = make_inputs(2)
  for scale in (1, 5.0):
    found = guidance.guided(rounding, scale)(x, t, cond, uncond)
    assert found.dtype == jnp.float32
  v, base = (rounding(x, t, c).astype(jnp.float32) for c in (cond, uncond))
  np.testing.assert_allclose(found, base + 5 * (v - base), rtol=0, atol=1e-5)


def concatenated(x, t, cond, uncond):
  """Concatenates the branches, which moves samples between devices."""
  condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)
  v = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), condition)
  v, base = jnp.split(v, 2)
  return base + 5 * (v - base)


def collectives(compiled):
  kinds = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
  return re.findall(rf"= .*?\b({kinds})(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_split_batch_stays_where_it_is(axes):
  mesh = sharding.make_mesh(axes)
  place = NamedSharding(mesh, sharding.BATCH)
  inputs = jax.device_put(make_inputs(8), place)
  together = jax.jit(guidance.guided(model, 5.0)).lower(*inputs).compile()
  assert collectives(together) == []
  assert together.output_shardings.is_equivalent_to(place, 5)
  in_turn = guidance.guided(model, 5.0, batched=False)
  wanted = in_turn(*make_inputs(8))
  np.testing.assert_allclose(together(*inputs), wanted, rtol=0, atol=1e-5)
  # `collectives` does find the traffic of concatenated branches.
  assert collectives(jax.jit(concatenated).lower(*inputs).compile())
