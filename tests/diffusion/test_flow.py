"""Schedules against Wan2.1 9737cba and diffusers 0.35.2 and 0.42.1; flow."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow
from tests import golden_data

PUBLISHED = {  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
  "_class_name": "UniPCMultistepScheduler",
  "_diffusers_version": "0.33.0.dev0",
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "disable_corrector": [],
  "dynamic_thresholding_ratio": 0.995,
  "final_sigmas_type": "zero",
  "flow_shift": 3.0,
  "lower_order_final": True,
  "num_train_timesteps": 1000,
  "predict_x0": True,
  "prediction_type": "flow_prediction",
  "rescale_betas_zero_snr": False,
  "sample_max_value": 1.0,
  "solver_order": 2,
  "solver_p": None,
  "solver_type": "bh2",
  "steps_offset": 0,
  "thresholding": False,
  "timestep_spacing": "linspace",
  "trained_betas": None,
  "use_beta_sigmas": False,
  "use_exponential_sigmas": False,
  "use_flow_sigmas": True,
  "use_karras_sigmas": False,
}


def golden_cases():
  path = golden_data.GOLDEN / "schedulers" / "schedulers.json"
  return json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_levels_equal_the_reference_bit_for_bit(case):
  name, config = case["name"], case["config"]
  grid = {"unipc": "diffusers_0_37", "fmeuler": "euler_double_shift"}
  grid |= {"officialwan": "wan", "unipc0352": "diffusers_0_36"}
  shift = case.get("set_timesteps_kwargs", config).get("shift")
  found = flow.schedule(
    case["steps"],
    shift or config["flow_shift"],
    grid=grid[name.split("_")[0]],
    final=config.get("final_sigmas_type", "zero"),
  )
  golden = golden_data.io("schedulers", "schedulers")
  np.testing.assert_array_equal(found.sigmas, golden[f"out.{name}.sigmas"])
  np.testing.assert_array_equal(
    found.timesteps, golden[f"out.{name}.timesteps"]
  )
  assert found.sigmas.dtype == np.float32
  assert found.timesteps.dtype == (
    np.float32 if name.startswith("fmeuler") else np.int32
  )


@pytest.mark.parametrize(
  ("grid", "steps", "shift", "timesteps"),
  [
    ("wan", 9, 1, [999, 888, 777, 666, 555, 444, 333, 222, 111]),
    ("diffusers_0_36", 9, 1, [999, 888, 777, 666, 555, 443, 332, 221, 110]),
    ("wan_dpm", 9, 1, [1000, 888, 777, 666, 555, 444, 333, 222, 111]),
    ("wan", 8, 3, [999, 954, 899, 832, 749, 642, 499, 299]),
    ("wan_dpm", 8, 3, [1000, 954, 900, 833, 750, 642, 500, 300]),
  ],
)
def test_timesteps_where_rounding_decides(grid, steps, shift, timesteps):
  """As printed by the references' own classes."""
  assert flow.schedule(steps, shift, grid=grid).timesteps.tolist() == timesteps


@pytest.mark.parity
@pytest.mark.parametrize("shift", [1.0, 2.3, 3.0, 5.0, 16.0])
@pytest.mark.parametrize(
  "grid", ["diffusers_0_36", "diffusers_0_37", "euler", "euler_double_shift"]
)
def test_levels_equal_the_installed_diffusers(grid, shift):
  import diffusers

  general = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
  for steps in [*range(1, 31), 50, 77, 100]:
    if grid == "diffusers_0_36":
      scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=shift, **general
      )
    elif grid == "diffusers_0_37":
      scheduler = diffusers.UniPCMultistepScheduler(flow_shift=shift, **general)
    else:
      scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if grid == "euler":
      scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, steps))
    else:
      scheduler.set_timesteps(steps)
    found = flow.schedule(steps, shift, grid=grid)
    np.testing.assert_array_equal(found.sigmas, scheduler.sigmas.numpy())
    np.testing.assert_array_equal(found.timesteps, scheduler.timesteps.numpy())


@pytest.mark.parametrize("grid", flow.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_levels_fall_to_zero(grid, steps):
  sigmas, timesteps = flow.schedule(steps, 5.0, grid=grid)
  assert len(sigmas) == steps + 1 and len(timesteps) == steps
  assert sigmas[0] > 0.999 and sigmas[-1] == 0
  assert (np.diff(sigmas) < 0).all()
  np.testing.assert_allclose(timesteps, 1000 * sigmas[:-1], rtol=0, atol=1)


def test_default_is_wans_grid():
  sigmas = flow.schedule(20, 5.0).sigmas
  assert sigmas[0] == np.float32(flow.shifted(np.float64(0.999), 5.0))
  newer = flow.schedule(20, 5.0, grid="diffusers_0_37").sigmas
  assert 3e-3 < np.abs(sigmas - newer).max() < 4e-3


def test_double_shift_is_an_option():
  once, twice = (
    flow.schedule(20, 5.0, grid=grid).sigmas[-2]
    for grid in ("euler", "euler_double_shift")
  )
  np.testing.assert_allclose([once, twice], [0.00498, 0.02441], atol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    ((0, 5.0), {}, "steps must be a whole number >= 1, found 0"),
    ((2.5, 5.0), {}, "steps .* found 2.5"),
    ((4, -1.0), {}, "shift must be positive, found -1.0"),
    ((4, float("nan")), {}, "shift .* found nan"),
    ((4, "5"), {}, "shift .* found 5"),
    ((float("nan"), 5.0), {}, "steps .* found nan"),
    ((float("inf"), 5.0), {}, "steps .* found inf"),
    (("4", 5.0), {}, "steps .* found 4"),
    ((4, 5.0), {"train_steps": float("nan")}, "training steps .* found nan"),
    ((4, 5.0), {"grid": "karras"}, "grids are wan, .* found 'karras'"),
    ((4, 5.0), {"final": "one"}, "zero or sigma_min, found 'one'"),
    ((4, 5.0), {"train_steps": 1}, "training steps .* found 1"),
  ],
)
def test_schedules_that_cannot_be_are_refused(arguments, options, message):
  with pytest.raises(errors.UserError, match=message):
    flow.schedule(*arguments, **options)


def test_published_config():
  options = flow.from_config(PUBLISHED)
  assert options == flow.Options(
    solver="unipc",
    solver_options={
      "order": 2,
      "variant": "bh2",
      "lower_order_final": True,
      "disable_corrector": [],
    },
    shift=3.0,
    grid="diffusers_0_36",
  )
  expected = flow.schedule(7, 3.0, grid="diffusers_0_36")
  for found, wanted in zip(options.schedule(7), expected, strict=True):
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ("version", "grid"),
  [
    ("0.36.0", "diffusers_0_36"),
    ("0.37.0", "diffusers_0_37"),
    ("0.42.1", "diffusers_0_37"),
    ("1.0", "diffusers_0_37"),
    (None, "wan"),
    ("unknown", "wan"),
  ],
)
def test_recorded_version_chooses_the_grid(version, grid):
  config = PUBLISHED | {"_diffusers_version": version}
  assert flow.from_config(config).grid == grid


@pytest.mark.parametrize(
  ("name", "solver", "grid"),
  [
    ("FlowUniPCMultistepScheduler", "unipc", "wan"),
    ("FlowDPMSolverMultistepScheduler", "dpm++", "wan_dpm"),
    ("FlowMatchEulerDiscreteScheduler", "euler", "euler"),
  ],
)
def test_flow_classes(name, solver, grid):
  options = flow.from_config({"_class_name": name, "shift": 8})
  assert options == flow.Options(solver, {}, 8.0, grid)


def test_options_of_another_solver_are_left_out():
  config = PUBLISHED | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "solver_type": "midpoint",
  }
  options = flow.from_config(config)
  assert (options.solver, options.grid) == ("dpm++", "diffusers_0_36")
  assert sorted(options.solver_options) == [
    "euler_at_final",
    "lower_order_final",
    "order",
    "variant",
  ]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"_class_name": "DDIMScheduler"}, "scheduler classes .* 'DDIMScheduler'"),
    ({"_class_name": None}, "scheduler classes are .* found None"),
    ({"prediction_type": "epsilon"}, "found prediction_type='epsilon'"),
    ({"use_flow_sigmas": False}, "found use_flow_sigmas=False"),
    ({"predict_x0": False}, "with predict_x0=True, found predict_x0=False"),
    ({"use_karras_sigmas": True}, "found use_karras_sigmas=True"),
    ({"thresholding": True, "predict_x0": False}, "predict_x0.*thresholding"),
    ({"flow_shift": "5"}, "flow_shift must be a number, found '5'"),
    ({"num_train_timesteps": None}, "num_train_timesteps must be a number"),
    ({"num_train_timesteps": float("inf")}, "num_train_timesteps .* found inf"),
    ({"flow_shift": float("nan")}, "flow_shift must be a number, found nan"),
    (
      {
        "_class_name": "DPMSolverMultistepScheduler",
        "final_sigmas_type": "sigma_min",
      },
      "found final_sigmas_type='sigma_min'",
    ),
  ],
)
def test_configs_of_something_else_are_refused(change, message):
  with pytest.raises(errors.UserError, match=message):
    flow.from_config(PUBLISHED | change)


def test_general_class_must_say_that_it_is_a_flow():
  with pytest.raises(errors.UserError, match="found prediction_type='epsilon'"):
    flow.from_config({"_class_name": "UniPCMultistepScheduler"})


def random(*shape, seed=0):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def test_noise_is_added_as_the_reference_does():
  golden = golden_data.io("schedulers", "schedulers")
  prefix = "out.fmeuler_shift5_n4.scale_noise"
  found = flow.add_noise(
    jnp.asarray(golden[f"{prefix}.sample"]),
    jnp.asarray(golden[f"{prefix}.noise"]),
    golden[f"{prefix}.timesteps"] / 1000,
  )
  np.testing.assert_allclose(found, golden[f"{prefix}.out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [(), (2,), (2, 3)])
def test_clean_latents_come_back(levels):
  x0, noise = random(2, 3, 2, 2, 4), random(2, 3, 2, 2, 4, seed=1)
  sigma = jnp.abs(random(*levels, seed=2)) % 1
  x, rate = jax.jvp(
    lambda sigma: flow.add_noise(x0, noise, sigma),
    (sigma,),
    (jnp.ones_like(sigma),),
  )
  v = flow.velocity(x0, noise)
  np.testing.assert_allclose(v, rate, rtol=0, atol=1e-6)
  sigma = sigma.reshape(*sigma.shape, *[1] * (x0.ndim - sigma.ndim))
  np.testing.assert_allclose(x - sigma * v, x0, rtol=0, atol=1e-6)


def test_mathematics_is_float32():
  x0, noise = random(2, 3).astype(jnp.bfloat16), random(2, 3, seed=1)
  v = flow.velocity(x0, noise.astype(jnp.bfloat16))
  x = flow.add_noise(x0, noise.astype(jnp.bfloat16), 0.5)
  assert {x.dtype, v.dtype} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  "change",
  [
    {"_class_name": ["UniPCMultistepScheduler"]},
    {"flow_shift": float("nan")},
    {"flow_shift": float("inf")},
    {"flow_shift": 0},
    {"flow_shift": -5.0},
    {"flow_shift": 10**400},
    {"num_train_timesteps": 0},
    {"num_train_timesteps": float("inf")},
  ],
)
def test_settings_that_are_no_schedule(change):
  """Unchecked, each would reach the noise levels or end in a traceback."""
  config = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
  }
  flow.from_config(config)
  with pytest.raises(errors.UserError, match=next(iter(change)).strip("_")[:5]):
    flow.from_config(config | change)
