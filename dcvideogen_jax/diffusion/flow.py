"""Flow matching: noise levels, their shift, and what a noisy sample is.

A sample at noise level sigma is `(1 - sigma) * x0 + sigma * noise`; a model
predicts the velocity `noise - x0`. Sampling goes from sigma near 1 down to 0.

The grids follow, bit for bit,
  Wan-Video/Wan2.1 `wan/utils/fm_solvers_unipc.py`, `wan/utils/fm_solvers.py`
    (commit 9737cba) and
  huggingface/diffusers: `UniPCMultistepScheduler` of 0.35.2 and 0.42.1,
    `DPMSolverMultistepScheduler`, `FlowMatchEulerDiscreteScheduler` of 0.42.1.
"""

import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dcvideogen_jax import errors

TRAIN_STEPS = 1000


class Schedule(NamedTuple):
  """Noise levels of a sampling run, high to low.

  Attributes:
    sigmas: (steps + 1,) float32; the model is called at all but the last.
    timesteps: (steps,) what the network is told, `1000 * sigma`: int32, rounded
      down, or float32, as the reference of the grid has it.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray


class Options(NamedTuple):
  """What a checkpoint says about sampling; see `from_config`.

  Attributes:
    solver: a name in `solvers.SOLVERS`.
    solver_options: keyword arguments of that solver.
    shift, grid, final, train_steps: arguments of `schedule`.
  """

  solver: str
  solver_options: Mapping[str, Any]
  shift: float
  grid: str
  final: str = "zero"
  train_steps: int = TRAIN_STEPS

  def schedule(self, steps: int) -> Schedule:
    """The noise levels of `steps` steps; errors as of `schedule`."""
    return schedule(
      steps,
      self.shift,
      grid=self.grid,
      final=self.final,
      train_steps=self.train_steps,
    )


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """Moves noise levels up: `shift * sigma / (1 + (shift - 1) * sigma)`."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def _wan(steps: int, shift: float, train_steps: int) -> np.ndarray:
  # Wan keeps the highest level as a float32, which decides some timesteps.
  highest = float(np.float32(1 - 1 / train_steps))
  return shifted(np.linspace(highest, 0, steps + 1)[:-1], shift)


def _wan_dpm(steps: int, shift: float, train_steps: int) -> np.ndarray:
  del train_steps
  return shifted(np.linspace(1, 0, steps + 1)[:-1], shift)


def _diffusers_0_36(steps: int, shift: float, train_steps: int) -> np.ndarray:
  rising = 1 - np.linspace(1, 1 / train_steps, steps + 1)
  return shifted(rising, shift)[:0:-1]


def _diffusers_0_37(steps: int, shift: float, train_steps: int) -> np.ndarray:
  sigmas = shifted(np.linspace(1, 1 / train_steps, steps + 1)[:-1], shift)
  sigmas[0] -= 1e-6  # From 1, where the signal-to-noise ratio is zero.
  return sigmas


def _euler(steps: int, shift: float, train_steps: int) -> np.ndarray:
  sigmas = np.linspace(1, 1 / train_steps, steps)
  return shifted(sigmas.astype(np.float32), shift)


def _euler_double_shift(
  steps: int, shift: float, train_steps: int
) -> np.ndarray:
  ends = shifted(np.array([1, 1 / train_steps], np.float32), shift)
  highest, lowest = (float(sigma) * train_steps for sigma in ends)
  return shifted(np.linspace(highest, lowest, steps) / train_steps, shift)


class _Grid(NamedTuple):
  # (steps, shift, train_steps) -> all levels but the last
  sigmas: Callable[[int, float, int], np.ndarray]
  whole_timesteps: bool


GRIDS = {
  # Wan2.1's UniPC: from shift(0.999). Up to 0.36 diffusers has the same levels
  # within 6e-8, but rounds to another timestep now and then.
  "wan": _Grid(_wan, True),
  # Wan2.1's DPM++: from 1.
  "wan_dpm": _Grid(_wan_dpm, True),
  # UniPC up to diffusers 0.36; DPM++ in any diffusers.
  "diffusers_0_36": _Grid(_diffusers_0_36, True),
  # UniPC since diffusers 0.37: from 1 - 1e-6.
  "diffusers_0_37": _Grid(_diffusers_0_37, True),
  # Flow-matching Euler: from 1 to shift(0.001), shifted once.
  "euler": _Grid(_euler, False),
  # What diffusers does: the lowest level is shifted twice, to 0.0244 for a
  # shift of 5.
  "euler_double_shift": _Grid(_euler_double_shift, False),
}


def schedule(
  steps: int,
  shift: float,
  *,
  grid: str = "wan",
  final: str = "zero",
  train_steps: int = TRAIN_STEPS,
) -> Schedule:
  """The noise levels of a sampling run.

  Args:
    steps: model evaluations, at least 1.
    shift: above 0; more than 1 spends more steps at high noise. Wan: 5, but 3
      for image to video at 480p.
    grid: a name in `GRIDS`.
    final: "zero", or "sigma_min", which repeats the lowest level of the grid.
    train_steps: levels the model was trained with; the scale of the timesteps.

  Raises:
    errors.UserError: for steps or a shift out of range, or an unknown name.
  """
  if not _whole(steps) or steps < 1:
    raise errors.UserError(f"steps must be a whole number >= 1, found {steps}")
  if not isinstance(shift, Real) or not 0 < shift < np.inf:
    raise errors.UserError(f"the flow shift must be positive, found {shift}")
  if grid not in GRIDS:
    raise errors.UserError(
      f"noise level grids are {', '.join(GRIDS)}, found {grid!r}"
    )
  if final not in ("zero", "sigma_min"):
    raise errors.UserError(
      f"the final noise level is zero or sigma_min, found {final!r}"
    )
  if not _whole(train_steps) or train_steps < 2:
    raise errors.UserError(
      f"training steps must be a whole number >= 2, found {train_steps}"
    )
  exact = GRIDS[grid].sigmas(int(steps), float(shift), train_steps)
  sigmas = exact.astype(np.float32)
  timesteps: np.ndarray = sigmas * np.float32(train_steps)
  if GRIDS[grid].whole_timesteps:
    # Rounded down before sigma is rounded, as the references do.
    timesteps = (exact * train_steps).astype(np.int32)
  last = sigmas[-1:] if final == "sigma_min" else np.zeros(1, np.float32)
  return Schedule(np.concatenate([sigmas, last]), timesteps)


def _whole(value: Any) -> bool:
  """Whether it is a whole number, such as 4 and 4.0."""
  if not isinstance(value, Real):
    return False
  number = float(value)
  return math.isfinite(number) and number % 1 == 0


def _expand(sigma: Any, x: Array) -> Array:
  """Gives `sigma` as many axes as `x`, its own ones leading."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return jnp.expand_dims(sigma, range(sigma.ndim, x.ndim))


def add_noise(
  x0: Float[Array, "*n"],
  noise: Float[Array, "*n"],
  sigma: float | Float[Array, "*b"],
) -> Float32[Array, "*n"]:
  """The sample at noise level `sigma`, float32.

  Args:
    x0: clean latents.
    noise: of the same shape, standard normal.
    sigma: levels in [0, 1] of the leading axes of `x0`: (), (b,) or (b, t).
  """
  sigma = _expand(sigma, x0)
  return (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(
    jnp.float32
  )


def velocity(
  x0: Float[Array, "*n"], noise: Float[Array, "*n"]
) -> Float32[Array, "*n"]:
  """What a model predicts: `noise - x0`, float32, the same at every level."""
  return noise.astype(jnp.float32) - x0.astype(jnp.float32)


class _Class(NamedTuple):
  solver: str
  shift: str  # its key
  grid: str | None  # None: depends on the version
  defaults: Mapping[str, Any] = {}  # where they are not what is required


# Diffusers' classes serve other kinds of model unless told otherwise.
_GENERAL = {"prediction_type": "epsilon", "use_flow_sigmas": False}
_CLASSES = {
  "UniPCMultistepScheduler": _Class("unipc", "flow_shift", None, _GENERAL),
  "FlowUniPCMultistepScheduler": _Class("unipc", "shift", "wan"),
  "DPMSolverMultistepScheduler": _Class(
    "dpm++", "flow_shift", "diffusers_0_36", _GENERAL
  ),
  "FlowDPMSolverMultistepScheduler": _Class("dpm++", "shift", "wan_dpm"),
  "FlowMatchEulerDiscreteScheduler": _Class("euler", "shift", "euler"),
}

_REQUIRED = {
  "algorithm_type": "dpmsolver++",
  "predict_x0": True,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
}
_UNSUPPORTED = (
  "invert_sigmas",
  "shift_terminal",
  "solver_p",
  "stochastic_sampling",
  "thresholding",
  "use_beta_sigmas",
  "use_dynamic_shifting",
  "use_exponential_sigmas",
  "use_karras_sigmas",
  "use_lu_lambdas",
)

# Config key -> our option, by solver.
_SOLVER_OPTIONS = {
  "unipc": {
    "solver_order": "order",
    "solver_type": "variant",
    "lower_order_final": "lower_order_final",
    "disable_corrector": "disable_corrector",
  },
  "dpm++": {
    "solver_order": "order",
    "solver_type": "variant",
    "lower_order_final": "lower_order_final",
    "euler_at_final": "euler_at_final",
  },
  "euler": {},
}


def from_config(config: Mapping[str, Any]) -> Options:
  """What a diffusers `scheduler_config.json` asks for.

  UniPC's grid is the one of the diffusers version that wrote the file, Wan's
  own where that is not recorded. Flow-matching Euler gets "euler"; the double
  shift of diffusers has to be asked for by name.

  Args:
    config: the parsed file. Keys that flow matching does not use are ignored.

  Raises:
    errors.UserError: for another scheduler class, or a setting that this
      package does not have, such as a prediction type other than flow.
  """
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in _CLASSES:
    raise errors.UserError(
      f"scheduler classes are {', '.join(_CLASSES)}, found {name!r}"
    )
  row = _CLASSES[name]
  _refuse_unsupported(name, row, config)
  keys = _SOLVER_OPTIONS[row.solver]
  return Options(
    solver=row.solver,
    solver_options={keys[k]: v for k, v in config.items() if k in keys},
    shift=_number(config, row.shift, 1.0),
    grid=row.grid or _unipc_grid(config.get("_diffusers_version")),
    final=config.get("final_sigmas_type", "zero"),
    train_steps=int(_number(config, "num_train_timesteps", TRAIN_STEPS)),
  )


def _refuse_unsupported(
  name: str, row: _Class, config: Mapping[str, Any]
) -> None:
  settings = {**row.defaults, **config}
  required = dict(_REQUIRED)
  if name != "UniPCMultistepScheduler":
    # The others end at a level of a schedule that is not a flow's.
    required["final_sigmas_type"] = "zero"
  wrong = {k: v for k, v in required.items() if settings.get(k, v) != v}
  wrong |= {key: None for key in _UNSUPPORTED if settings.get(key)}
  if wrong:
    raise errors.UserError(
      f"{name} is supported with "
      + ", ".join(f"{key}={value!r}" for key, value in wrong.items())
      + ", found "
      + ", ".join(f"{key}={settings[key]!r}" for key in wrong)
    )


# Of shifts and of noise levels in training, far more than there are.
_MOST = 1_000_000


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
  value = config.get(key, default)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or value != value or abs(value) == np.inf:
    raise errors.UserError(f"{key} must be a number, found {value!r}")
  if not 0 < value < _MOST:
    raise errors.UserError(
      f"{key} must be above 0 and below {_MOST:,}, found {str(value)[:40]}"
    )
  return float(value)


def _unipc_grid(version: Any) -> str:
  known = re.match(r"(\d{1,9})\.(\d{1,9})", str(version))
  if not known:
    return "wan"
  newer = (int(known[1]), int(known[2])) >= (0, 37)
  return "diffusers_0_37" if newer else "diffusers_0_36"
