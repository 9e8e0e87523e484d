"""Few steps: levels and steps of published models, against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import few, flow, sampler, solvers

SHAPE = (2, 3, 2, 2, 4)
KEYS = jax.random.key_data(jax.random.split(jax.random.key(3), 2))


def model(x, t):
  return 0.3 * x + jnp.sin(t).reshape(-1, 1, 1, 1, 1)


def noise(seed=0):
  return jax.random.normal(jax.random.key(seed), SHAPE)


def samples(levels, solver, keys=KEYS):
  """The latents after every step."""
  plan = sampler.plan(flow.explicit(levels), solver)
  step = sampler.jit_step(model)
  stream = sampler.stream(step, noise(), plan, keys=keys)
  return [np.array(x) for _, x in stream]


@pytest.mark.parametrize("name", ["lightx2v", "self-forcing"])
def test_four_levels_by_the_published_formula(name):
  """1000, 750, 500 and 250 of 1000 float32 levels, shifted by 5."""
  table = np.linspace(1, 0, 1001, dtype=np.float32)[:-1]
  table = 5 * table / (1 + 4 * table)
  wanted = table[[0, 250, 500, 750]]
  found = flow.explicit(few.PRESETS[name].levels)
  np.testing.assert_allclose(found.sigmas, [*wanted, 0], rtol=0, atol=1e-6)
  np.testing.assert_allclose(found.timesteps, 1000 * wanted, rtol=1e-6)
  np.testing.assert_allclose(
    found.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-6
  )
  assert found.timesteps.dtype == np.float32
  # On a grid with whole timesteps the same levels lose up to half a step.
  whole = flow.schedule(4, 5.0, grid="wan_dpm")
  np.testing.assert_array_equal(whole.sigmas, found.sigmas)
  assert whole.timesteps.tolist() == [1000, 937, 833, 625]


def test_nine_timesteps_of_causvid():
  found = flow.explicit(few.PRESETS["causvid"].levels)
  wanted = np.float32([999, 934, 862, 756, 603, 410, 250, 140, 74])
  np.testing.assert_allclose(found.timesteps, wanted, rtol=1e-6)
  np.testing.assert_allclose(found.sigmas, [*wanted / 1000, 0], atol=1e-6)


@pytest.mark.parametrize("name", few.PRESETS)
def test_presets_can_be_sampled(name):
  preset = few.PRESETS[name]
  assert preset.weights
  found = samples(preset.levels, preset.solver)
  assert len(found) == len(preset.levels) and np.isfinite(found[-1]).all()


def test_fresh_noise_by_hand():
  """x0 = x - sigma v; then (1 - next) x0 + next * noise, drawn for each."""
  levels = few.levels(4, 5.0)
  x, keys = noise(), jax.random.wrap_key_data(KEYS)
  found = samples(levels, "renoise")
  drawn = []
  for sigma, following, ours in zip(
    levels, [*levels[1:], 0.0], found, strict=True
  ):
    x0 = x - sigma * model(x, jnp.full(2, 1000 * sigma))
    pairs = jax.vmap(jax.random.split)(keys)
    keys = pairs[:, 0]
    fresh = [jax.random.normal(key, SHAPE[1:]) for key in pairs[:, 1]]
    drawn += fresh
    x = (1 - following) * x0 + following * jnp.stack(fresh)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-6)
  # No noise is drawn twice, and it has the variance that it should have.
  table = np.corrcoef([np.ravel(n) for n in (*drawn, *noise())])
  assert np.abs(table - np.eye(10)).max() < 0.5
  assert 0.8 < np.std(drawn) < 1.2


def test_one_program_draws_the_same_noise():
  plan = sampler.plan(flow.explicit(few.levels(3, 3.0)), "renoise")
  whole = jax.jit(functools.partial(sampler.sample, model))
  found = samples(few.levels(3, 3.0), "renoise")[-1]
  np.testing.assert_allclose(
    whole(noise(), plan, keys=KEYS), found, rtol=0, atol=1e-6
  )
  # A sample's noise depends on its own key only.
  alone = whole(noise()[1:], plan, keys=KEYS[1:])
  np.testing.assert_allclose(alone, found[1:], rtol=0, atol=1e-6)
  other = whole(noise(), plan, keys=KEYS[::-1])
  assert np.abs(other - found).max() > 0.1


def test_solvers_without_fresh_noise_take_no_keys():
  plan = sampler.plan(flow.explicit((1.0, 0.5)), "euler")
  assert sampler.start(noise(), plan, KEYS).state.keys is None
  plan = sampler.plan(flow.explicit((1.0, 0.5)), "renoise")
  with pytest.raises(ValueError, match="draws noise in each step"):
    sampler.start(noise(), plan)


@pytest.mark.parity
@pytest.mark.parametrize(
  ("solver", "stochastic"), [("euler", False), ("renoise", True)]
)
@pytest.mark.parametrize("name", few.PRESETS)
def test_steps_equal_diffusers(name, solver, stochastic, monkeypatch):
  """Every level, timestep and step, given the same noise."""
  import diffusers
  import torch
  from diffusers.schedulers import scheduling_flow_match_euler_discrete

  levels = few.PRESETS[name].levels
  config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "stochastic_sampling": stochastic,
  }
  assert flow.from_config(config).solver == solver
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=1.0, stochastic_sampling=stochastic
  )
  scheduler.set_timesteps(sigmas=list(levels))
  found = flow.explicit(levels)
  np.testing.assert_allclose(scheduler.sigmas, found.sigmas, atol=1e-6)
  np.testing.assert_allclose(scheduler.timesteps, found.timesteps, rtol=1e-6)
  row = solvers.coefficients("renoise", found.sigmas)
  state = {"keys": solvers.init(row, noise(), KEYS)}

  def fresh(shape, **options):
    """What `solvers.step` adds to a sample that is all zeros."""
    one = solvers.Coefficients(
      np.float32(0), np.zeros(2, np.float32), None, np.float32(1)
    )
    zeros = jnp.zeros(tuple(shape))
    drawn, state["keys"] = solvers.step(one, state["keys"], zeros, zeros)
    return torch.from_numpy(np.array(drawn))

  monkeypatch.setattr(
    scheduling_flow_match_euler_discrete, "randn_tensor", fresh
  )
  x = torch.from_numpy(np.array(noise()))
  ours = samples(levels, solver)
  for t, wanted in zip(scheduler.timesteps, ours, strict=True):
    v = model(jnp.asarray(x.numpy()), jnp.full(2, float(t)))
    x = scheduler.step(torch.from_numpy(np.array(v)), t, x).prev_sample
    np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "renoise"])
@pytest.mark.parametrize("name", few.PRESETS)
def test_steps_equal_their_formulas_in_float64(name, solver):
  """From noise to the end; float32 loses 3e-7 at most, diffusers 2.4e-7."""
  levels = [*few.PRESETS[name].levels, 0.0]
  found = samples(levels[:-1], solver)
  x, keys = np.float64(noise()), jax.random.wrap_key_data(KEYS)
  for sigma, following, ours in zip(levels, levels[1:], found, strict=False):
    # What the model gets is float32.
    t = np.float64(np.float32(1000) * np.float32(sigma))
    v = 0.3 * x + np.sin(t)
    pairs = jax.vmap(jax.random.split)(keys)
    keys = pairs[:, 0]
    if solver == "euler":
      x = x + (following - sigma) * v
    else:
      fresh = [jax.random.normal(key, SHAPE[1:]) for key in pairs[:, 1]]
      x = (1 - following) * (x - sigma * v) + following * np.float64(fresh)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "levels",
  [(), (1.1, 0.5), (0.5, 0.5), (0.5, 0.0), (0.5, 0.7), "4", None, (True,)],
)
def test_levels_that_make_no_sense(levels):
  with pytest.raises(errors.UserError, match="noise levels"):
    flow.explicit(levels)


def test_levels_of_options():
  options = flow.Options("euler", {}, 5.0, "wan", levels=(1.0, 0.5))
  np.testing.assert_array_equal(options.schedule(2).sigmas, [1, 0.5, 0])
  with pytest.raises(errors.UserError, match="2 noise levels are 2 steps"):
    options.schedule(3)
