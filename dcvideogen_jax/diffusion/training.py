"""Noise levels and loss weights of training with flow matching.

The draw "official" follows DC-Gen `dc_ai/videogencore/schedulers/
flow_match_scheduler.py` and `models/wan_t2v.py` (commit 562077c). The other
draws deviate: their timestep is exactly the noise level of the sample.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow

# Number of levels in the official grid; sampling takes as many steps.
_STEPS = 50


class Levels(NamedTuple):
  """Noise levels of a batch: float32, one per sample (b,) or per part (b, n).

  Attributes:
    sigma: noise level, in [0, 1].
    timestep: input of the network, 0 to 1000.
    weight: factor in the loss.
  """

  sigma: Array
  timestep: Array
  weight: Array


class Grid(NamedTuple):
  """Tables of the official noise levels.

  Attributes:
    sigmas: (50,) float32, high to low.
    weights: (50,) float32 factors in the loss, with mean 1 over the grid.
    nearest: (1000,) index of the level nearest to each timestep; the higher
      level if two are equally near.
  """

  sigmas: np.ndarray
  weights: np.ndarray
  nearest: np.ndarray


def _gaussian_weight(sigma: Any, exp: Callable[[Any], Any]) -> Any:
  """Returns the loss weight before scaling, with its maximum at sigma 0.5."""
  return exp(-2 * (sigma - 0.5) ** 2)


def _linspace(points: int) -> np.ndarray:
  """Returns `torch.linspace(1, 0, points)` in float32, bit for bit.

  torch counts from the nearer end, with a step rounded to float32, and rounds
  each value once.
  """
  i = np.arange(points)
  step = float(np.float32(-1) / np.float32(points - 1))
  first, last = 1 + step * i, -step * (points - 1 - i)
  return np.where(i < points // 2, first, last).astype(np.float32)


@functools.cache
def official_grid(shift: float) -> Grid:
  """Returns the 50 noise levels to which the official training rounds.

  Args:
    shift: flow shift, above 0; 8 for text to video, 5 for image to video.
  """
  sigmas = flow.shifted(_linspace(_STEPS + 1)[:-1], shift)
  times = sigmas * np.float32(flow.TRAIN_STEPS)
  distance = np.abs(times[None] - np.arange(flow.TRAIN_STEPS)[:, None])
  weights = _gaussian_weight(sigmas, np.exp)
  weights -= weights.min()
  weights *= _STEPS / weights.sum()
  return Grid(sigmas, weights, distance.argmin(axis=1))


@functools.cache
def _scale(shift: float, points: int = 100_000) -> tuple[float, float]:
  """Returns the weight's minimum, and its mean above that over the draws."""
  lowest = float(_gaussian_weight(0.0, np.exp))
  sigmas = flow.shifted((np.arange(points) + 0.5) / points, shift)
  return lowest, float((_gaussian_weight(sigmas, np.exp) - lowest).mean())


def _continuous(rng: Array, count: int, shift: float) -> Levels:
  # Sigma is above 0: a sample without noise teaches the model nothing.
  even: Any = jax.random.uniform(
    rng, (count,), minval=np.finfo(np.float32).tiny, maxval=1
  )
  sigma: Any = flow.shifted(even, shift)
  lowest, mean = _scale(shift)
  weight = (_gaussian_weight(sigma, jnp.exp) - lowest) / mean
  return Levels(sigma, sigma * flow.TRAIN_STEPS, weight)


def _official(rng: Array, count: int, shift: float) -> Levels:
  grid = official_grid(shift)
  timestep = jax.random.randint(rng, (count,), 0, flow.TRAIN_STEPS)
  index = jnp.asarray(grid.nearest)[timestep]
  return Levels(
    jnp.asarray(grid.sigmas)[index],
    timestep.astype(jnp.float32),
    jnp.asarray(grid.weights)[index],
  )


DRAWS: Mapping[str, Callable[[Array, int, float], Levels]] = {
  # Sigma is uniform in (0, 1): the limit of the official draw for a fine grid.
  "uniform": lambda rng, count, shift: _continuous(rng, count, 1.0),
  # Sigma is uniform, then shifted as in sampling, unlike in official training.
  "shifted": _continuous,
  # The timestep is one of 1000 integers; sigma is the nearest of 50 levels.
  "official": _official,
}


def levels(
  rng: Array,
  batch: int,
  config: Mapping[str, Any],
  parts: int | None = None,
) -> Levels:
  """Draws the noise levels of a batch.

  The weight is `exp(-2 (sigma - 0.5)^2)` less its minimum, scaled; it is 0 for
  a sample of noise only. Its mean over the draws is 1. Only the official draw
  has a mean of 1 over its grid instead, and a larger mean over the draws (1.64
  for a shift of 8), which matters if gradients are clipped.

  Args:
    rng: a PRNG key.
    batch: number of samples.
    config: "draw", a key of `DRAWS`; "shift", above 0, which "uniform" does
      not use; "weighted", whether the weight is other than 1.
    parts: parts of each sample that have their own levels, such as chunks;
      None draws one level per sample, (b,).

  Raises:
    errors.UserError: for a config that lacks one of these keys, has others, or
      has a value out of range.
  """
  draw, shift, weighted = _checked(config)
  found = DRAWS[draw](rng, batch * (parts or 1), shift)
  if parts is not None:
    found = Levels(*(x.reshape(batch, parts) for x in found))
  if not weighted:
    return found._replace(weight=jnp.ones_like(found.weight))
  return found


def _checked(config: Mapping[str, Any]) -> tuple[str, float, bool]:
  keys = ("draw", "shift", "weighted")
  if set(config) != set(keys):
    raise errors.UserError(
      f"levels need exactly the keys {', '.join(keys)}, found {sorted(config)}"
    )
  if config["draw"] not in DRAWS:
    raise errors.UserError(
      f"levels.draw must be one of {', '.join(DRAWS)}, found {config['draw']!r}"
    )
  shift = config["shift"]
  if not isinstance(shift, int | float) or not 0 < shift < np.inf:
    raise errors.UserError(f"levels.shift must be positive, found {shift!r}")
  return config["draw"], float(shift), bool(config["weighted"])


def squared_error(
  velocity: Float[Array, "b ..."],
  x0: Float[Array, "b ..."],
  noise: Float[Array, "b ..."],
  axes: int = 1,
) -> Float32[Array, "*b"]:
  """Returns the mean squared error of the predicted velocity, in float32.

  Args:
    velocity: the model's prediction.
    x0: clean latents.
    noise: the noise that was added to them.
    axes: number of leading axes to keep: 1 for an error per sample, 2 for one
      per frame.
  """
  error = velocity.astype(jnp.float32) - flow.velocity(x0, noise)
  return jnp.square(error).mean(axis=range(axes, error.ndim))
