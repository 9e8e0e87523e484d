"""Sampling: one program or many, the same latents; memory and devices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.diffusion import flow, guidance, sampler
from tests import golden_data


def random(*shape, seed=0):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


WEIGHTS = random(4, 4, seed=7)
NOISE = random(2, 3, 2, 2, 4)


def model(x, t, weights, bias):
  t = jnp.expand_dims(t / 1000, range(1, x.ndim))
  return jnp.tanh(x @ weights) * t + bias


SOLVERS = [
  ("unipc", {}),
  ("unipc", {"order": 3, "variant": "bh1", "disable_corrector": (1,)}),
  ("dpm++", {}),
  ("euler", {}),
]


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_one_program_equals_one_per_step(solver, options):
  plan = sampler.plan(flow.schedule(7, 5.0), solver, **options)
  inputs = WEIGHTS, jnp.float32(0.1)
  whole = jax.jit(functools.partial(sampler.sample, model))
  wanted = whole(NOISE, plan, *inputs)
  step = sampler.jit_step(model)
  seen = [
    (i, np.array(x)) for i, x in sampler.stream(step, NOISE, plan, *inputs)
  ]
  assert [i for i, _ in seen] == list(range(7)) and plan.steps == 7
  np.testing.assert_allclose(seen[-1][1], wanted, rtol=0, atol=1e-6)
  assert len({x.tobytes() for _, x in seen}) == 7


def test_trajectory_equals_the_reference():
  """Wan2.1 9737cba `FlowUniPCMultistepScheduler`, v = 0.3 x + sin(step)."""
  name = "officialwan_unipc_shift5_n20"
  golden = golden_data.io("schedulers", "schedulers")
  path = golden_data.GOLDEN / "schedulers" / "schedulers.json"
  cases = json.loads(path.read_text())["cases"]
  (case,) = (case for case in cases if case["name"] == name)
  schedule = flow.schedule(20, 5.0)

  def toy(x, t):
    i = jnp.argmin(jnp.abs(jnp.asarray(schedule.timesteps) - t[0]))
    return case["toy_a"] * x + jnp.sin(i.astype(jnp.float32))

  noise = golden[f"in.{name}.x0"]
  trajectory = golden[f"out.{name}.trajectory"]
  stream = sampler.stream(
    sampler.jit_step(toy), noise, sampler.plan(schedule, "unipc")
  )
  for i, x in stream:
    np.testing.assert_allclose(x, trajectory[i + 1], rtol=0, atol=1e-5)


def test_model_sees_float32_latents_and_timesteps():
  seen = []

  def spy(x, t):
    seen.append((x.shape, x.dtype, t.shape, t.dtype))
    jax.debug.callback(lambda t: told.append(np.array(t)), t, ordered=True)
    return x.astype(jnp.bfloat16)

  told = []
  schedule = flow.schedule(4, 3.0)
  plan = sampler.plan(schedule)
  found = jax.jit(functools.partial(sampler.sample, spy))(
    NOISE.astype(jnp.bfloat16), plan
  )
  jax.effects_barrier()
  float32 = jnp.dtype("float32")
  assert set(seen) == {(NOISE.shape, float32, (2,), float32)}
  np.testing.assert_array_equal(
    told, np.stack([schedule.timesteps] * 2, axis=1)
  )
  assert found.dtype == float32


def test_one_compilation_serves_every_plan_of_a_solver():
  traces = []

  def counted(x, t, *inputs):
    traces.append(None)
    return model(x, t, *inputs)

  step = sampler.jit_step(counted)
  for steps, shift, grid in (
    (2, 5.0, "wan"),
    (5, 3.0, "diffusers_0_37"),
    (3, 5.0, "diffusers_0_36"),
  ):
    plan = sampler.plan(flow.schedule(steps, shift, grid=grid))
    for _ in sampler.stream(step, NOISE, plan, WEIGHTS, jnp.float32(0)):
      pass
  assert len(traces) == step._cache_size() == 1


def test_latents_are_donated_and_the_noise_is_not():
  noise = random(2, 3, 2, 2, 4)
  plan = sampler.plan(flow.schedule(3, 5.0))
  step = sampler.jit_step(model)
  held = [
    x for _, x in sampler.stream(step, noise, plan, WEIGHTS, jnp.float32(0))
  ]
  assert [x.is_deleted() for x in held] == [True, True, False]
  assert not noise.is_deleted() and not WEIGHTS.is_deleted()
  carry = sampler.start(noise, plan)
  step(carry, sampler.row(plan, 0), WEIGHTS, jnp.float32(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


def test_step_can_be_compiled_ahead():
  plan = sampler.plan(flow.schedule(3, 5.0))
  inputs = WEIGHTS, jnp.float32(0.1)
  step = sampler.jit_step(model)
  shapes = jax.eval_shape(sampler.start, NOISE, plan)
  compiled = step.lower(shapes, sampler.row(plan, 0), *inputs).compile()
  found, wanted = (
    list(sampler.stream(f, NOISE, plan, *inputs))[-1][1]
    for f in (compiled, step)
  )
  np.testing.assert_array_equal(found, wanted)


def test_split_batch_needs_no_traffic():
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  place = NamedSharding(mesh, sharding.BATCH)
  noise, cond, uncond = (
    random(8, *shape, seed=i)
    for i, shape in enumerate([(2, 2, 2, 4), (4,), (4,)])
  )

  def conditional(x, t, condition):
    return model(x, t, WEIGHTS, jnp.expand_dims(condition, (1, 2, 3)))

  guided = guidance.guided(conditional, 4.0)
  plan = sampler.plan(flow.schedule(4, 5.0))
  split = jax.device_put((noise, cond, uncond), place)
  carry = sampler.start(split[0], plan)
  assert all(
    x.sharding.is_equivalent_to(place, 5) for x in jax.tree.leaves(carry)
  )
  whole = jax.jit(functools.partial(sampler.sample, guided))
  compiled = whole.lower(split[0], plan, *split[1:]).compile()
  assert "all-" not in compiled.as_text()
  assert "collective-permute" not in compiled.as_text()
  wanted = whole(noise, plan, cond, uncond)
  found = compiled(split[0], plan, *split[1:])
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
  *_, (_, last) = sampler.stream(
    sampler.jit_step(guided), split[0], plan, *split[1:]
  )
  assert last.sharding.is_equivalent_to(place, 5)
  np.testing.assert_allclose(last, wanted, rtol=0, atol=1e-5)


def test_plan_is_made_of_float32_rows():
  plan = sampler.plan(flow.schedule(5, 5.0), "unipc", order=3)
  assert {x.dtype for x in jax.tree.leaves(plan)} == {np.dtype("float32")}
  assert {len(x) for x in jax.tree.leaves(plan)} == {5}
  np.testing.assert_array_equal(
    sampler.row(plan, 2).coefficients.predict, plan.coefficients.predict[2]
  )
  with pytest.raises(errors.UserError, match="solvers are"):
    sampler.plan(flow.schedule(5, 5.0), "ddim")


def test_gradients_pass_through_the_loop():
  """Distillation needs gradients; they match a difference quotient."""
  plan = sampler.plan(flow.schedule(3, 5.0))

  def total(scale):
    out = sampler.sample(model, NOISE, plan, scale * WEIGHTS, jnp.float32(0))
    return jnp.sum(out * random(*NOISE.shape, seed=3))

  slope = jax.jit(jax.grad(total))(1.0)
  quotient = (jax.jit(total)(1.01) - jax.jit(total)(0.99)) / 0.02
  np.testing.assert_allclose(slope, quotient, rtol=1e-2)
  assert abs(slope) > 1e-2
