"""Runs as `loop.fit` leaves them, without the training."""

import contextlib
import json

import jax
import numpy as np

from dcvideogen_jax import checkpoint
from dcvideogen_jax.train import step

STEP = 7
COMMON = {
  "seed": 3,
  "steps": 20,
  "accumulate": 1,
  "ema": {"decay": 0.9, "ramp": "exponential", "steps": 10},
  "optim": {
    "name": "adamw",
    "lr": 1e-3,
    "warmup": 1,
    "schedule": "constant",
    "final": 0.0,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "clip": 0.1,
    "decay": 0.0,
    "decay_mask": ((".*", False),),
  },
  "mesh": {"data": -1},
  "sharding": ((".*", "fsdp"),),
  "data": {"source": "noise", "shapes": {"deep": (2, 2, 2, 6)}},
}


def write(workdir, config):
  """Writes a run with random parameters; returns the averaged ones."""
  config = COMMON | config
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(json.dumps(config))
  run = step.plan(config)
  state = jax.tree.map(lambda x: _random(x, 1), run.state)
  if state.ema is not None:
    ema = jax.tree.map(lambda x: _random(x, 2), run.state.ema)
    state = state.replace(ema=ema)
  with (
    contextlib.closing(
      run.task.batches(config["data"], batch_size=8, seed=0)
    ) as data,
    checkpoint.Checkpointer(workdir / "checkpoints") as saver,
  ):
    saver.save(STEP, state, data)
  return jax.device_get(state.params if state.ema is None else state.ema)


def _random(leaf, seed):
  """Where the run has it; no two leaves are alike."""
  random = np.random.default_rng((seed, *leaf.shape))
  values = 0.2 * random.normal(size=leaf.shape)
  return jax.device_put(values.astype(leaf.dtype), leaf.sharding)
