"""Flow matching in training: which noise levels, and how much they count.

"official" follows DC-Gen `dc_ai/videogencore/schedulers/
flow_match_scheduler.py` and `models/wan_t2v.py` (commit 562077c). The others
are deviations: there the network is told the very level that the sample has.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow

# Of the official grid; it is also what sampling takes.
_STEPS = 50


class Levels(NamedTuple):
  """Noise levels of a batch, float32 (b,) or, of parts of samples, (b, n).

  Attributes:
    sigma: level of the sample, in [0, 1].
    timestep: what the network is told, 0 to 1000.
    weight: of the sample in the loss.
  """

  sigma: Array
  timestep: Array
  weight: Array


class Grid(NamedTuple):
  """The official noise levels as tables, float32 and int.

  Attributes:
    sigmas: (50,), high to low.
    weights: (50,) in the loss, their mean over the grid 1.
    nearest: (1000,) position of the level nearest to each timestep; the higher
      level where two are as near.
  """

  sigmas: np.ndarray
  weights: np.ndarray
  nearest: np.ndarray


def _gaussian_weight(sigma: Any, exp: Callable[[Any], Any]) -> Any:
  """Weight before scaling: highest at 0.5."""
  return exp(-2 * (sigma - 0.5) ** 2)


def _linspace(points: int) -> np.ndarray:
  """From 1 to 0 as `torch.linspace` has it in float32, bit for bit.

  It counts from either end, with a rounded step, and rounds once.
  """
  i = np.arange(points)
  step = float(np.float32(-1) / np.float32(points - 1))
  first, last = 1 + step * i, -step * (points - 1 - i)
  return np.where(i < points // 2, first, last).astype(np.float32)


@functools.cache
def official_grid(shift: float) -> Grid:
  """The 50 levels that the official training snaps to.

  Args:
    shift: above 0; 8 for text to video, 5 for image to video.
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
  """What the weight loses, and is divided by for a mean of 1 over the draws."""
  lowest = float(_gaussian_weight(0.0, np.exp))
  sigmas = flow.shifted((np.arange(points) + 0.5) / points, shift)
  return lowest, float((_gaussian_weight(sigmas, np.exp) - lowest).mean())


def _continuous(rng: Array, count: int, shift: float) -> Levels:
  # Never 0, where there is nothing to learn.
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
  # Sigma is uniform in (0, 1): the official draw on an ever finer grid.
  "uniform": lambda rng, count, shift: _continuous(rng, count, 1.0),
  # Sigma is uniform, then shifted as in sampling: another training.
  "shifted": _continuous,
  # A whole timestep, of 1000; sigma is the nearest on a grid of 50.
  "official": _official,
}


def levels(
  rng: Array,
  batch: int,
  config: Mapping[str, Any],
  parts: int | None = None,
) -> Levels:
  """Draws the noise levels of a batch.

  The weight is `exp(-2 (sigma - 0.5)^2)`, less its lowest value. It is 0 where
  a sample is noise only. Its mean over the draws is 1, but in the official
  draw, where the mean over the grid is 1 and that over the draws is more (1.64
  for a shift of 8): that matters where gradients are clipped.

  Args:
    rng: a key.
    batch: number of samples.
    config: "draw", a key of `DRAWS`; "shift", above 0, which "uniform" does
      not use; "weighted", whether the weight is other than 1.
    parts: of each sample that get levels of their own; None is one level (b,).

  Raises:
    errors.UserError: for a config that lacks one of these, has others, or does
      not fit.
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
  """Mean squared error of each sample's predicted velocity, in float32.

  Args:
    velocity: as predicted.
    x0: clean latents.
    noise: of the same shape.
    axes: leading ones that stay: 1 for samples, 2 for their frames.
  """
  error = velocity.astype(jnp.float32) - flow.velocity(x0, noise)
  return jnp.square(error).mean(axis=range(axes, error.ndim))
