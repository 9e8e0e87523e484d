"""Flow matching: noise levels, the flow shift and noisy samples.

A sample at noise level sigma is `(1 - sigma) * x0 + sigma * noise`; a model
predicts the velocity `noise - x0`. Sampling goes from sigma near 1 down to 0.

The grids follow, bit for bit:

- Wan-Video/Wan2.1 `wan/utils/fm_solvers_unipc.py`, `wan/utils/fm_solvers.py`
  (commit 9737cba);
- huggingface/diffusers `UniPCMultistepScheduler` of 0.35.2 and 0.42.1,
  `DPMSolverMultistepScheduler`, `FlowMatchEulerDiscreteScheduler` of 0.42.1.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array

TRAIN_STEPS = 1000


class Schedule(NamedTuple):
  """Noise levels of a sampling run, high to low.

  Attributes:
    sigmas: (steps + 1,) float32; the model is called at all but the last.
    timesteps: (steps,) inputs of the network, `train_steps * sigma`: int32,
      rounded down, or float32, as in the reference of the grid.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray


class Options(NamedTuple):
  """Sampling settings of a checkpoint; see `from_config`.

  Attributes:
    solver: a name in `solvers.SOLVERS`.
    solver_options: keyword arguments of that solver.
    shift, grid, final, train_steps: arguments of `schedule`.
    levels: noise levels as for `explicit`, instead of the grid's; None for the
      grid's.
  """

  solver: str
  solver_options: Mapping[str, Any]
  shift: float
  grid: str
  final: str = "zero"
  train_steps: int = TRAIN_STEPS
  levels: Sequence[float] | None = None

  def schedule(self, steps: int) -> Schedule:
    """Returns the noise levels of `steps` steps.

    Raises:
      errors.UserError: as the functions `schedule` and `explicit` do, or for
        another number of steps than `levels`.
    """
    if self.levels is not None:
      found = explicit(self.levels, train_steps=self.train_steps)
      if len(found.timesteps) != steps:
        raise errors.UserError(
          f"{len(found.timesteps)} noise levels are {len(found.timesteps)} "
          f"steps, found {steps}"
        )
      return found
    return schedule(
      steps,
      self.shift,
      grid=self.grid,
      final=self.final,
      train_steps=self.train_steps,
    )


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """Shifts noise levels to `shift * sigma / (1 + (shift - 1) * sigma)`."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def _wan(steps: int, shift: float, train_steps: int) -> np.ndarray:
  # Wan rounds the highest level to float32, which changes some timesteps.
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
  sigmas[0] -= 1e-6  # At sigma 1 the signal-to-noise ratio is zero.
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
  # UniPC of Wan 2.1 starts at 0.999, shifted. diffusers up to 0.36 has the same
  # levels within 6e-8, but some of its timesteps round to another integer.
  "wan": _Grid(_wan, True),
  # DPM++ of Wan 2.1 starts at 1.
  "wan_dpm": _Grid(_wan_dpm, True),
  # UniPC of diffusers up to 0.36, and DPM++ of every diffusers version.
  "diffusers_0_36": _Grid(_diffusers_0_36, True),
  # UniPC of diffusers since 0.37 starts at 1 - 1e-6.
  "diffusers_0_37": _Grid(_diffusers_0_37, True),
  # Flow-matching Euler goes from 1 to 0.001; each level is shifted once.
  "euler": _Grid(_euler, False),
  # Flow-matching Euler of diffusers shifts the lowest level twice, to 0.0244
  # for a shift of 5.
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
  """Computes the noise levels of a sampling run.

  Args:
    steps: model evaluations, at least 1.
    shift: flow shift, above 0; values above 1 spend more steps at high noise.
      Wan uses 5, and 3 for image to video at 480p.
    grid: a name in `GRIDS`.
    final: "zero", or "sigma_min", which repeats the lowest level of the grid.
    train_steps: number of noise levels in training, the scale of the timesteps.

  Raises:
    errors.UserError: for a number of steps or a shift out of range, or an
      unknown `grid` or `final`.
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
    # The references, too, round timesteps down from sigma in float64.
    timesteps = (exact * train_steps).astype(np.int32)
  last = sigmas[-1:] if final == "sigma_min" else np.zeros(1, np.float32)
  return Schedule(np.concatenate([sigmas, last]), timesteps)


def explicit(
  levels: Sequence[float], *, train_steps: int = TRAIN_STEPS
) -> Schedule:
  """Returns a schedule of given noise levels; the timesteps are not rounded.

  Args:
    levels: noise levels at which the model is called, high to low; the run ends
      at 0.
    train_steps: the scale of the timesteps.

  Raises:
    errors.UserError: unless the levels fall from at most 1 to above 0.
  """
  numbers = isinstance(levels, Sequence) and not isinstance(levels, str)
  if not numbers or not all(_is_number(x) for x in levels) or not levels:
    raise errors.UserError(
      f"noise levels are a list of numbers, found {levels!r}"
    )
  exact = np.array([*levels, 0.0], np.float64)
  if exact[0] > 1 or not (np.diff(exact) < 0).all():
    raise errors.UserError(
      f"noise levels must fall from at most 1 to above 0, found {[*levels]}"
    )
  sigmas = exact.astype(np.float32)
  return Schedule(sigmas, sigmas[:-1] * np.float32(train_steps))


def _is_number(value: Any) -> bool:
  return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
  """Whether the value is a whole number, such as 4 or 4.0."""
  if not isinstance(value, Real):
    return False
  number = float(value)
  return math.isfinite(number) and number % 1 == 0


def _expand(sigma: Any, x: Array) -> Array:
  """Appends axes of size 1 to `sigma` until it has as many axes as `x`."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return jnp.expand_dims(sigma, range(sigma.ndim, x.ndim))


def add_noise(
  x0: Float[Array, "*n"],
  noise: Float[Array, "*n"],
  sigma: float | np.floating | Float[Array, "*b"],
) -> Float32[Array, "*n"]:
  """Returns the noisy sample `(1 - sigma) * x0 + sigma * noise`, float32.

  Args:
    x0: clean latents.
    noise: standard normal noise.
    sigma: noise levels in [0, 1]: one for all samples, one per sample (b,) or
      one per sample and frame (b, t).
  """
  sigma = _expand(sigma, x0)
  return (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(
    jnp.float32
  )


def velocity(
  x0: Float[Array, "*n"], noise: Float[Array, "*n"]
) -> Float32[Array, "*n"]:
  """Returns `noise - x0`, float32: the model's target at every noise level."""
  return noise.astype(jnp.float32) - x0.astype(jnp.float32)


class _Class(NamedTuple):
  solver: str
  shift: str  # config key of the flow shift
  grid: str | None  # None: chosen by the diffusers version
  defaults: Mapping[str, Any] = {}  # the class's defaults unlike _REQUIRED


# Unless configured for flow matching, these diffusers classes predict epsilon.
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
  "thresholding",
  "use_beta_sigmas",
  "use_dynamic_shifting",
  "use_exponential_sigmas",
  "use_karras_sigmas",
  "use_lu_lambdas",
)

# By solver: config key -> option of the solver's function in `solvers`.
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
  "renoise": {},
}


def from_config(config: Mapping[str, Any]) -> Options:
  """Reads the sampling settings of a diffusers `scheduler_config.json`.

  UniPC gets the grid of the diffusers version that wrote the file, or Wan's own
  grid if the file does not record a version. Flow-matching Euler gets the grid
  "euler"; the double shift of diffusers has to be chosen by name.

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
  if row.solver == "euler" and config.get("stochastic_sampling"):
    row = row._replace(solver="renoise")
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
    # With another value these classes end at a level of a schedule that is not
    # a flow's.
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


# Bound of flow shifts and of training noise levels, far above real values.
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
