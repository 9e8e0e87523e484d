"""Solvers against diffusers and Wan2.1; orders of convergence.

Golden trajectories: diffusers 0.42.1 (`unipc_*`, `fmeuler_*`) and 0.35.2
(`unipc0352_*`), Wan2.1 9737cba (`officialwan_*`), on v = 0.3 x + sin(step).
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow, solvers
from tests import golden_data

TRAJECTORY = 1e-5  # max abs at every step; 2e-6 seen
OURS = {
  "solver_order": "order",
  "solver_type": "variant",
  "lower_order_final": "lower_order_final",
  "euler_at_final": "euler_at_final",
  "disable_corrector": "disable_corrector",
}


def row_of(coefficients, i):
  return jax.tree.map(lambda x: x[i], coefficients)


# For samples of a batch of one, of the solver that draws noise.
KEYS = jax.random.key_data(jax.random.split(jax.random.key(0), 1))
jitted_step = jax.jit(solvers.step)


def trajectory(velocity, coefficients, x):
  """Samples and states after every step; velocity(x, i)."""
  keys = None if coefficients.noise is None else KEYS
  state = solvers.init(coefficients, x, keys)
  for i in range(len(coefficients.sigma)):
    v = velocity(x, i)
    x, state = jitted_step(row_of(coefficients, i), state, x, v)
    yield np.asarray(x), state


def golden_cases():
  path = golden_data.GOLDEN / "schedulers" / "schedulers.json"
  return json.loads(path.read_text())["cases"]


def solve_golden(case):
  golden = golden_data.io("schedulers", "schedulers")
  sigmas = golden[f"out.{case['name']}.sigmas"]
  options = {OURS[k]: v for k, v in case["config"].items() if k in OURS}
  solver = "euler" if case["name"].startswith("fmeuler") else "unipc"
  return trajectory(
    lambda x, i: case["toy_a"] * x + np.float32(np.sin(i)),
    solvers.coefficients(solver, sigmas, **options),
    jnp.asarray(golden[f"in.{case['name']}.x0"]),
  )


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_trajectory_equals_the_reference_at_every_step(case):
  golden = golden_data.io("schedulers", "schedulers")
  expected = golden[f"out.{case['name']}.trajectory"][1:]
  for (x, _), wanted in zip(solve_golden(case), expected, strict=True):
    np.testing.assert_allclose(x, wanted, rtol=0, atol=TRAJECTORY)


@pytest.mark.parametrize(
  "name", ["officialwan_unipc_shift5_n20", "unipc_shift3_n8_bh1_order3"]
)
def test_memory_equals_the_reference_at_every_step(name):
  golden = golden_data.io("schedulers", "schedulers")
  (case,) = (case for case in golden_cases() if case["name"] == name)
  for i, (_, state) in enumerate(solve_golden(case)):
    for found, kind in (
      (state.history[0], "x0_pred"),
      (state.last, "corrected_sample"),
    ):
      wanted = golden[f"out.{name}.{kind}"][i]
      np.testing.assert_allclose(found, wanted, rtol=0, atol=TRAJECTORY)


def compare(scheduler, solver, steps, sigmas=None, **options):
  """A diffusers scheduler and ours on one random velocity field."""
  import torch

  scheduler.set_timesteps(steps)
  if sigmas is not None:
    scheduler.sigmas = torch.tensor(sigmas)
  rng = np.random.default_rng(steps)
  x = rng.standard_normal((1, 2, 3, 3, 4)).astype(np.float32)
  field = rng.standard_normal((steps, *x.shape)).astype(np.float32)
  steered = trajectory(
    lambda x, i: field[i] + jnp.sin(x),
    solvers.coefficients(solver, scheduler.sigmas.numpy(), **options),
    jnp.asarray(x),
  )
  sample = torch.tensor(x)
  for i, (found, _) in enumerate(steered):
    v = torch.tensor(field[i]) + torch.sin(sample)
    sample = scheduler.step(v, scheduler.timesteps[i], sample).prev_sample
    np.testing.assert_allclose(found, sample, rtol=0, atol=TRAJECTORY)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parity
@pytest.mark.parametrize(
  ("order", "variant", "options"),
  [
    *itertools.product((1, 2, 3), ("bh1", "bh2"), ({},)),
    (2, "bh2", {"disable_corrector": [0, 3]}),
    (3, "bh2", {"disable_corrector": list(range(9))}),
    (2, "bh1", {"lower_order_final": False}),
  ],
)
def test_unipc_equals_diffusers(order, variant, options):
  import diffusers

  options = {"solver_order": order, "solver_type": variant, **options}
  scheduler = diffusers.UniPCMultistepScheduler(
    flow_shift=3.0,
    # At a final level of 0, bh1 is infinity times 0 there.
    final_sigmas_type="sigma_min" if variant == "bh1" else "zero",
    **FLOW,
    **options,
  )
  options = {OURS[k]: v for k, v in options.items() if k in OURS}
  compare(scheduler, "unipc", 9, **options)


@pytest.mark.parity
@pytest.mark.parametrize(
  ("steps", "order", "variant", "options"),
  [
    *itertools.product((9, 16), (1, 2), ("midpoint",), ({},)),
    (9, 2, "heun", {}),
    (9, 2, "midpoint", {"lower_order_final": False}),
    (16, 2, "midpoint", {"euler_at_final": True}),
    (1, 2, "midpoint", {}),
  ],
)
def test_dpm_equals_diffusers(steps, order, variant, options):
  import diffusers

  options = {"solver_order": order, "solver_type": variant, **options}
  scheduler = diffusers.DPMSolverMultistepScheduler(
    flow_shift=5.0, **FLOW, **options
  )
  compare(scheduler, "dpm++", steps, **{OURS[k]: v for k, v in options.items()})


@pytest.mark.parity
@pytest.mark.parametrize(
  ("options", "last"),
  [
    ({"lower_order_final": False}, 0.2),
    ({"lower_order_final": True}, 0.2),
    ({"euler_at_final": True, "lower_order_final": False}, 0.2),
  ],
)
def test_dpm_equals_diffusers_above_zero(options, last):
  """Above noise level 0 the last step may have any order."""
  import diffusers

  scheduler = diffusers.DPMSolverMultistepScheduler(
    final_sigmas_type="sigma_min", **FLOW, **options
  )
  sigmas = np.linspace(0.9, last, 7).astype(np.float32)
  compare(scheduler, "dpm++", 6, sigmas, **options)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [2, 9])
def test_dpm_equals_diffusers_from_pure_noise(steps):
  """Wan's grid for it starts at 1, where the signal-to-noise ratio is 0."""
  import diffusers

  scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
  sigmas = flow.schedule(steps, 5.0, grid="wan_dpm").sigmas
  assert sigmas[0] == 1
  compare(scheduler, "dpm++", steps, sigmas)


@pytest.mark.parity
def test_euler_equals_diffusers():
  import diffusers

  compare(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "euler", 9)


# Data of independent normal components; the model's best velocity is linear.
WIDTHS = jnp.array([0.2, 0.4, 1.5, 3.0], jnp.float32)


def deviation(sigma):
  return jnp.sqrt(((1 - sigma) * WIDTHS) ** 2 + sigma**2)


def linear_velocity(x, sigma):
  x0 = (1 - sigma) * WIDTHS**2 * x / deviation(sigma) ** 2
  return (x - x0) / sigma


@jax.jit
def solve_linear(coefficients):
  x = jnp.ones(4)

  def body(carry, row):
    x, state = carry
    v = linear_velocity(x, row.sigma)
    return solvers.step(row, state, x, v), None

  carry = (x, solvers.init(coefficients, x))
  return jax.lax.scan(body, carry, coefficients)[0][0]


@pytest.mark.parametrize(
  ("solver", "options", "order"),
  [
    ("euler", {}, 1),
    ("dpm++", {"order": 1}, 1),
    ("dpm++", {"variant": "midpoint"}, 2),
    ("dpm++", {"variant": "heun"}, 2),
    ("unipc", {"order": 1, "variant": "bh1"}, 2),
    ("unipc", {"order": 1, "variant": "bh2"}, 2),
    ("unipc", {"order": 2, "variant": "bh1"}, 3),
    ("unipc", {"order": 2, "variant": "bh2"}, 3),
    ("unipc", {"order": 1, "disable_corrector": range(99)}, 1),
    ("unipc", {"order": 2, "disable_corrector": range(99)}, 2),
    # The first step, of order 1 and corrected, leaves an error of order 3.
    ("unipc", {"order": 3, "variant": "bh2"}, 3),
  ],
)
def test_order_of_convergence(solver, options, order):
  if solver != "euler":
    options = options | {"lower_order_final": False}
  wrong = []
  for steps in (16, 32, 64):
    sigmas = np.linspace(0.8, 0.2, steps + 1).astype(np.float32)
    found = solve_linear(solvers.coefficients(solver, sigmas, **options))
    exact = deviation(sigmas[-1]) / deviation(sigmas[0])
    wrong.append(np.linalg.norm(found - exact))
  measured = np.log2(np.divide(wrong[:-1], wrong[1:]))
  np.testing.assert_allclose(measured, order, rtol=0, atol=0.5)


def exact_integral(sigma, following, power):
  """Returns the next sample from 0 if the clean prediction is a power.

  The prediction is (log snr) ** power.
  """
  rate, integral = 1.0, np.zeros(2)
  log_snr = np.log((1 - np.array([sigma, following])) / [sigma, following])
  for k in range(power, -1, -1):
    integral += rate * log_snr**k
    rate *= -k
  integral *= np.exp(log_snr)
  return following * (integral[1] - integral[0])


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_integrates_polynomials(order, variant):
  """The predictor of order 3 up to degree 2, correctors up to their order."""
  sigmas = np.array([0.9, 0.75, 0.6, 0.5, 0.35, 0.3])
  made = solvers.coefficients(
    "unipc", sigmas, order=order, variant=variant, lower_order_final=False
  )
  log_snr = np.log((1 - sigmas) / sigmas)
  i = 4
  past = log_snr[[i, i - 1, i - 2, i - 3]]
  if order == 3:
    for power in range(3):
      predicted = made.predict[i, 1:4] @ past[:3] ** power
      wanted = exact_integral(sigmas[i], sigmas[i + 1], power)
      np.testing.assert_allclose(predicted, wanted, rtol=0, atol=1e-6)
  for power in range(order + 1):
    corrected = made.correct[i, 2:] @ past[: order + 1] ** power
    wanted = exact_integral(sigmas[i - 1], sigmas[i], power)
    np.testing.assert_allclose(corrected, wanted, rtol=0, atol=1e-6)


def test_dpm_integrates_lines():
  sigmas = np.array([0.9, 0.75, 0.6, 0.3, 0.2])
  made = solvers.coefficients(
    "dpm++", sigmas, variant="heun", lower_order_final=False
  )
  log_snr = np.log((1 - sigmas) / sigmas)
  for i in (1, 2, 3):
    for power in (0, 1):
      predicted = made.predict[i, 1:] @ log_snr[[i, i - 1]] ** power
      wanted = exact_integral(sigmas[i], sigmas[i + 1], power)
      np.testing.assert_allclose(predicted, wanted, rtol=0, atol=1e-6)


# "renoise" leaves the path in every step; see test_few.py.
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_straight_paths_are_followed_exactly(solver, steps):
  rng = np.random.default_rng(steps)
  x0, noise = rng.standard_normal((2, 1, 2, 3, 3, 4)).astype(np.float32)
  sigmas = flow.schedule(steps, 5.0).sigmas
  made = solvers.coefficients(solver, sigmas)
  start = flow.add_noise(x0, noise, sigmas[0])
  for i, (x, _) in enumerate(trajectory(lambda x, i: noise - x0, made, start)):
    wanted = flow.add_noise(x0, noise, sigmas[i + 1])
    np.testing.assert_allclose(x, wanted, rtol=0, atol=TRAJECTORY)


@pytest.mark.parametrize(
  ("solver", "past", "corrects"),
  [("unipc", 2, True), ("dpm++", 1, False), ("euler", 0, False)],
)
def test_state_keeps_its_shape_and_float32(solver, past, corrects):
  made = solvers.coefficients(solver, flow.schedule(4, 5.0).sigmas)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 2, 2, 3)))
  state = solvers.init(made, x.astype(jnp.bfloat16))
  assert len(state.history) == past and (state.last is not None) == corrects
  assert not any(leaf.any() for leaf in jax.tree.leaves(state))
  following = jitted_step(
    row_of(made, 0),
    state,
    x.astype(jnp.bfloat16),
    x.astype(jnp.bfloat16),
  )
  shapes = [jax.tree.map(jax.typeof, y) for y in ((x, state), following)]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_step_index_may_be_traced(solver):
  made = solvers.coefficients(solver, flow.schedule(5, 5.0).sigmas)
  made = jax.tree.map(jnp.asarray, made)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 2, 2, 3)))

  def body(i, carry):
    x, state = carry
    return solvers.step(row_of(made, i), state, x, jnp.sin(x))

  found, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 5, body, c))(
    (x, solvers.init(made, x, KEYS))
  )
  *_, (wanted, _) = trajectory(lambda x, i: jnp.sin(x), made, x)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


FALLING = np.linspace(0.9, 0, 6)


@pytest.mark.parametrize(
  ("solver", "sigmas", "options", "message"),
  [
    ("heun", FALLING, {}, "solvers are unipc, .* found 'heun'"),
    ("euler", FALLING, {"order": 2}, "euler are none, found order"),
    ("unipc", FALLING, {"p": 2}, "are order, variant, .* found p"),
    ("unipc", FALLING, {"order": 4}, r"one of \(1, 2, 3\), found 4"),
    ("unipc", FALLING, {"variant": "bh3"}, "variant of UniPC .* 'bh3'"),
    ("dpm++", FALLING, {"order": 3}, r"one of \(1, 2\), found 3"),
    ("dpm++", FALLING, {"variant": "bh2"}, r"DPM\+\+ .* found 'bh2'"),
    ("unipc", FALLING, {"lower_order_final": False}, "ends at noise level 0"),
    ("unipc", [1.0, 0.5, 0.0], {}, "below 1, found 1"),
    ("euler", [0.5, 0.7, 0.0], {}, "must fall"),
    ("euler", [1.1, 0.7, 0.0], {}, "must fall from at most 1"),
    ("euler", [0.5, 0.3, -0.1], {}, "to at least 0"),
    ("euler", [0.5, np.nan, 0.0], {}, "must fall"),
    ("euler", [], {}, r"are \(steps \+ 1,\), found the shape \(0,\)"),
    ("euler", [FALLING], {}, r"found the shape \(1, 6\)"),
    ("unipc", FALLING, {"disable_corrector": None}, "lists steps, found None"),
  ],
)
def test_what_cannot_be_solved_is_refused(solver, sigmas, options, message):
  with pytest.raises(errors.UserError, match=message):
    solvers.coefficients(solver, sigmas, **options)
