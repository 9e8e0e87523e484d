"""The train state: one tree that holds everything a step changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dcvideogen_jax import tree


@flax.struct.dataclass
class TrainState:
  """Leaves are named "params/...", "opt/0/mu/...", "ema/...", "rng", "step".

  `params`, `opt` and `ema` hold trainable leaves only, nested as the task's
  variables are; frozen ones are a tree of their own, which no step changes and
  no checkpoint holds. `ema` is None where the run keeps no average. `rng`, the
  numbers of a key, is never advanced: a step folds its number into the key
  (`step_key`), so that a resumed step draws what an uninterrupted one would
  have drawn.
  """

  step: jax.Array
  params: Any
  opt: optax.OptState
  ema: Any
  rng: jax.Array


def create(
  params: Any,
  optimiser: optax.GradientTransformation,
  seed: int,
  with_ema: bool,
) -> TrainState:
  """The state before the first step; pure, for `jax.eval_shape`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimiser.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    rng=jax.random.key_data(_keys(seed)[1]),
  )


def start_key(seed: int) -> jax.Array:
  """What everything that starts at random is drawn from, and nothing else."""
  return _keys(seed)[0]


def validation_key() -> jax.Array:
  """What every validation draws from, whatever the seed of its run."""
  return _keys(0)[2]


def step_key(state: TrainState) -> jax.Array:
  """What the next step draws from."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def averaged(state: TrainState, frozen: Any) -> Any:
  """The task's variables with averaged parameters, or current ones without."""
  return tree.merge(state.params if state.ema is None else state.ema, frozen)


def _keys(seed: int) -> jax.Array:
  return jax.random.split(jax.random.key(seed), 3)
