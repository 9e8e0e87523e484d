"""The train state: one tree that holds everything a step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dcvideogen_jax.train import tasks


@flax.struct.dataclass
class TrainState:
  """Leaves are named "params/...", "opt/0/mu/...", "ema/...", "rng", "step".

  `ema` is None where the run keeps no average. `rng` is never advanced: a
  step folds its number into it, so that a resumed step draws what an
  uninterrupted one would have drawn.
  """

  step: jax.Array
  params: Any
  opt: optax.OptState
  ema: Any
  rng: jax.Array


def create(
  task: tasks.Task,
  optimiser: optax.GradientTransformation,
  seed: int,
  with_ema: bool,
) -> TrainState:
  """A fresh state; pure, for `jax.eval_shape` and `jax.jit`."""
  rng = jax.random.PRNGKey(seed)
  init, carried = jax.random.split(rng)
  params = task.init(init)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimiser.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    rng=carried,
  )
