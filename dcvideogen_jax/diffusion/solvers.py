"""Solvers of the flow ODE: a table of coefficients, and one step function.

Each step of a solver is a linear combination of samples and predictions. The
weights depend only on the noise levels, so they are computed ahead, in float64.
UniPC, DPM++ 2M and Euler share one step function and differ in their weights.

They follow huggingface/diffusers 0.42.1, `UniPCMultistepScheduler` (with
`predict_x0`), `DPMSolverMultistepScheduler` ("dpmsolver++") and
`FlowMatchEulerDiscreteScheduler`, whose `stochastic_sampling` is "renoise".
Wan-Video/Wan2.1 (commit 9737cba) has copies of the first two. Papers: arXiv
2302.04867 (UniPC) and 2211.01095 (DPM-Solver++).

Time is measured as log((1 - sigma) / sigma), the logarithm of the
signal-to-noise ratio; h is its increase over a step.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt32

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array


class Coefficients(NamedTuple):
  """A solver for given noise levels: float32 arrays, one row per step.

  k is the number of past predictions of clean latents that the solver keeps.

  Attributes:
    sigma: (steps,) noise levels at which the model is called.
    predict: (steps, 2 + k) weights of the sample, the current prediction and
      the past predictions, newest first; the weighted sum is the next sample.
    correct: (steps, 3 + k) weights of the sample, the previous corrected
      sample, the current prediction and the past predictions; the weighted sum
      replaces the sample before `predict`. None for a solver without a
      corrector.
    noise: (steps,) weights of standard normal noise, drawn anew in each step,
      in the next sample. None for a solver that draws none.
  """

  sigma: Any
  predict: Any
  correct: Any = None
  noise: Any = None


class State(NamedTuple):
  """A solver's state between steps: float32 arrays shaped like the sample.

  Attributes:
    history: past predictions of clean latents, newest first; zeros before the
      first step.
    last: the previous sample, corrected; None for a solver without a corrector.
    keys: data of a random key per sample; None for a solver that draws none.
  """

  history: tuple[Array, ...]
  last: Array | None
  keys: Array | None = None


def init(
  coefficients: Coefficients,
  x: Float[Array, "b ..."],
  keys: UInt32[Array, "b n"] | None = None,
) -> State:
  """Returns the state before the first step, for samples shaped like `x`.

  Args:
    coefficients: of the solver.
    x: the samples.
    keys: data of a random key per sample; only solvers with `noise` use them.

  Raises:
    ValueError: if the solver draws noise and there are no keys.
  """
  if coefficients.noise is None:
    keys = None
  elif keys is None:
    raise ValueError("this solver draws noise in each step: expected keys")
  else:
    keys = jnp.array(keys, copy=True)
  past = coefficients.predict.shape[-1] - 2
  zeros = [jnp.zeros_like(x, jnp.float32) for _ in range(past + 1)]
  corrects = coefficients.correct is not None
  return State(tuple(zeros[1:]), zeros[0] if corrects else None, keys)


def step(
  row: Coefficients,
  state: State,
  x: Float[Array, "*n"],
  v: Float[Array, "*n"],
) -> tuple[Float32[Array, "*n"], State]:
  """Takes the sample to the next noise level.

  Args:
    row: the coefficients of this step, without the leading axis.
    state: from the previous step, or from `init`.
    x: the sample.
    v: the model's velocity at `x`.

  Returns:
    The next sample, float32, and the next state, of the same structure.
  """
  x = x.astype(jnp.float32)
  x0 = x - row.sigma * v.astype(jnp.float32)
  last = None
  if state.last is not None:
    x = last = _combine(row.correct, x, state.last, x0, *state.history)
  following = _combine(row.predict, x, x0, *state.history)
  history = (x0, *state.history)[: len(state.history)]
  keys = state.keys
  if keys is not None:
    keys, fresh = _draw(keys, x.shape[1:])
    following += row.noise * fresh
  return following, State(history, last, keys)


def _draw(keys: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """Returns the keys of the next step, and noise for each sample."""
  pairs = jax.vmap(jax.random.split)(jax.random.wrap_key_data(keys))
  fresh = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  return jax.random.key_data(pairs[:, 0]), fresh(pairs[:, 1])


def _combine(weights: Array, *arrays: Array) -> Array:
  terms = (weights[i] * array for i, array in enumerate(arrays))
  return functools.reduce(jnp.add, terms)


def coefficients(
  solver: str, sigmas: np.ndarray, **options: Any
) -> Coefficients:
  """Computes the coefficients of a solver.

  Args:
    solver: a name in `SOLVERS`.
    sigmas: (steps + 1,) falling noise levels, such as those of `flow.schedule`.
    **options: keyword arguments of that solver's function.

  Raises:
    errors.UserError: for an unknown solver or option, an option out of range,
      or noise levels that the solver cannot use.
  """
  if solver not in SOLVERS:
    raise errors.UserError(
      f"solvers are {', '.join(SOLVERS)}, found {solver!r}"
    )
  _, *known = inspect.signature(SOLVERS[solver]).parameters
  if unknown := sorted(options.keys() - set(known)):
    raise errors.UserError(
      f"options of {solver} are {', '.join(known) or 'none'}, "
      f"found {', '.join(unknown)}"
    )
  levels = np.asarray(sigmas, np.float64)
  if levels.ndim != 1 or len(levels) < 2:
    raise errors.UserError(
      f"noise levels are (steps + 1,), found the shape {levels.shape}"
    )
  between = (levels[:-1] > 0) & (levels[:-1] <= 1)
  falling = (np.diff(levels[:-1]) < 0).all() and levels[-1] <= levels[-2]
  if not (between.all() and falling and levels[-1] >= 0):
    raise errors.UserError(
      f"noise levels must fall from at most 1 to at least 0, found {levels}"
    )
  return SOLVERS[solver](levels, **options)


def euler(sigmas: np.ndarray) -> Coefficients:
  """Computes the coefficients of Euler's method.

  A step is `x + (next sigma - sigma) * v`.
  """
  kept = sigmas[1:] / sigmas[:-1]
  return _to_float32(sigmas, np.stack([kept, 1 - kept], axis=1))


def renoise(sigmas: np.ndarray) -> Coefficients:
  """Computes the coefficients of the sampler of consistency models.

  A step predicts the clean sample x0 and adds fresh noise to it, up to the next
  level: `(1 - next sigma) * x0 + next sigma * noise` (arXiv 2303.01469).
  """
  none = np.zeros(len(sigmas) - 1)
  predict = np.stack([none, 1 - sigmas[1:]], axis=1)
  return _to_float32(sigmas, predict, noise=sigmas[1:])


def dpmpp(
  sigmas: np.ndarray,
  *,
  order: int = 2,
  variant: str = "midpoint",
  lower_order_final: bool = True,
  euler_at_final: bool = False,
) -> Coefficients:
  """Computes the coefficients of multistep DPM-Solver++, "2M" for order 2.

  Args:
    sigmas: (steps + 1,) falling noise levels.
    order: 1 or 2.
    variant: "midpoint" or "heun", the two forms of the second order.
    lower_order_final: whether a run of fewer than 15 steps ends with a step of
      order 1.
    euler_at_final: whether every run ends with a step of order 1; a run that
      ends at noise level 0 always does.

  Raises:
    errors.UserError: for another order or variant.
  """
  _check_choice("DPM++", "order", order, (1, 2))
  _check_choice("DPM++", "variant", variant, ("midpoint", "heun"))
  steps = len(sigmas) - 1
  simple_end = (
    euler_at_final or (lower_order_final and steps < 15) or sigmas[-1] == 0
  )
  log_snr = _log_snr(sigmas)
  predict = np.zeros((steps, 1 + order))
  for i in range(steps):
    h = log_snr[i + 1] - log_snr[i]
    decay = np.expm1(-h)
    alpha = 1 - sigmas[i + 1]
    predict[i, :2] = sigmas[i + 1] / sigmas[i], -alpha * decay
    simple = order == 1 or i == 0 or (i == steps - 1 and simple_end)
    if simple or h == 0:
      continue
    slope = -decay / 2 if variant == "midpoint" else decay / h + 1
    slope *= alpha * h / (log_snr[i] - log_snr[i - 1])
    predict[i, 1:] += slope, -slope
  return _to_float32(sigmas, predict)


def unipc(
  sigmas: np.ndarray,
  *,
  order: int = 2,
  variant: str = "bh2",
  lower_order_final: bool = True,
  disable_corrector: Sequence[int] = (),
) -> Coefficients:
  """Computes the coefficients of UniPC, a multistep predictor and corrector.

  The sample at step i is predicted from earlier steps, and corrected once the
  model has been called on it. The corrector needs no further call.

  Args:
    sigmas: (steps + 1,) noise levels falling from below 1.
    order: 1, 2 or 3; the corrector raises the order of accuracy by one.
    variant: "bh1" or "bh2", the paper's B(h) = h or exp(h) - 1.
    lower_order_final: whether the order falls towards the last step, which a
      run that ends at noise level 0 needs.
    disable_corrector: indices of steps whose result is not corrected.

  Raises:
    errors.UserError: for another order or variant, a `disable_corrector` that
      is not a list, a first noise level of 1, or a run that ends at 0 without
      `lower_order_final`.
  """
  _check_choice("UniPC", "order", order, (1, 2, 3))
  _check_choice("UniPC", "variant", variant, ("bh1", "bh2"))
  if isinstance(disable_corrector, str) or not isinstance(
    disable_corrector, Sequence
  ):
    raise errors.UserError(
      f"disable_corrector of UniPC lists steps, found {disable_corrector!r}"
    )
  if sigmas[0] == 1:
    raise errors.UserError(
      "UniPC needs a first noise level below 1, found 1: choose another grid"
    )
  steps = len(sigmas) - 1
  if sigmas[-1] == 0 and order > 1 and steps > 1 and not lower_order_final:
    raise errors.UserError(
      "UniPC ends at noise level 0 with lower_order_final only, found False"
    )
  predict = np.zeros((steps, 2 + order))
  correct = np.zeros((steps, 3 + order))
  correct[:, 0] = 1
  for i in range(steps):
    now = min(order, i + 1, steps - i if lower_order_final else order)
    kept, _, *past = _unipc_weights(sigmas, i, now, variant, corrector=False)
    predict[i, : 1 + now] = kept, *past
    if i + 1 < steps and i not in disable_corrector:
      weights = _unipc_weights(sigmas, i, now, variant, corrector=True)
      correct[i + 1, : 3 + now] = 0, *weights
  return _to_float32(sigmas, predict, correct)


def _unipc_weights(
  sigmas: np.ndarray, i: int, order: int, variant: str, corrector: bool
) -> np.ndarray:
  """Computes the weights of a step of UniP or UniC from level i to i + 1.

  Returns:
    (2 + order,) weights: of the sample at i, then of the predictions at i + 1
    (0 without the corrector), i, i - 1 and so on.
  """
  weights = np.zeros(2 + order)
  log_snr = _log_snr(sigmas[: i + 2])
  h = log_snr[i + 1] - log_snr[i]
  if h == 0:
    weights[0] = 1
    return weights
  alpha = 1 - sigmas[i + 1]
  # Positions of the other known predictions, measured from i in units of h.
  points = (log_snr[i - np.arange(1, order)] - log_snr[i]) / h
  columns = 3 + np.arange(order - 1)
  if corrector:
    points, columns = np.append(points, 1.0), np.append(columns, 1)
  scale = -h if variant == "bh1" else np.expm1(-h)
  rho = _unipc_solve(points, h, scale)
  differences = -alpha * scale * rho / points
  weights[0] = sigmas[i + 1] / sigmas[i]
  weights[columns] = differences
  weights[2] = -alpha * np.expm1(-h) - differences.sum()
  return weights


def _unipc_solve(points: np.ndarray, h: float, scale: float) -> np.ndarray:
  """Solves for the paper's rho, weights of difference quotients at `points`."""
  if len(points) < 2:
    # 0.5 is exact to the wanted order; the paper's code and its copies use it.
    return np.full(len(points), 0.5)
  phi, right = np.expm1(-h) / -h - 1, []
  for j in range(1, 1 + len(points)):
    right.append(phi * math.factorial(j) / scale)
    phi = phi / -h - 1 / math.factorial(j + 1)
  return np.linalg.solve(np.vander(points, increasing=True).T, right)


def _log_snr(sigmas: np.ndarray) -> np.ndarray:
  with np.errstate(divide="ignore"):
    return np.log1p(-sigmas) - np.log(sigmas)


def _to_float32(
  sigmas: np.ndarray,
  predict: np.ndarray,
  correct: np.ndarray | None = None,
  noise: np.ndarray | None = None,
) -> Coefficients:
  every = Coefficients(sigmas[:-1], predict, correct, noise)
  return jax.tree.map(lambda x: x.astype(np.float32), every)


def _check_choice(
  solver: str, name: str, value: Any, choices: Sequence[Any]
) -> None:
  if value not in choices:
    raise errors.UserError(
      f"{name} of {solver} is one of {choices}, found {value!r}"
    )


SOLVERS: dict[str, Callable[..., Coefficients]] = {
  "unipc": unipc,
  "dpm++": dpmpp,
  "euler": euler,
  "renoise": renoise,
}
