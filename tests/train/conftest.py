"""A task and a config small enough to train in a test many times."""

import copy

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax import levels
from dcvideogen_jax.train import step, task


def _linear(config):
  """Reconstructs each pixel from noisy neighbours, so that rng matters.

  A gain is frozen.
  """

  def init(rng):
    kernel = jax.random.normal(rng, (8 * 3, 8 * 3)) / 5
    return {"mix": {"kernel": kernel, "gain": jnp.float32(0.9)}}

  def apply(params, batch):
    video = levels.to_float(batch["video"])
    rows = video.reshape(*video.shape[:3], -1)
    output = (rows @ params["mix"]["kernel"]).reshape(video.shape)
    return video, params["mix"]["gain"] * output

  def draw(batch, rng):
    noise = jax.random.normal(rng, batch["video"].shape)
    return {**batch, "noise": noise}

  def loss_fn(params, drawn):
    video, output = apply(params, drawn)
    error = output + 0.1 * drawn["noise"] - video
    # A finite loss whose extra metric can be made to blow up.
    return jnp.square(error).mean(), {"blow": jnp.exp(config["model"]["blow"])}

  def measure(params, batch):
    video, output = apply(params, batch)
    error = jnp.square(video - output).mean((1, 2, 3, 4))
    bright = video.mean((1, 2, 3, 4)) > 0
    return {"psnr": -error, "bright": jnp.where(bright, error, jnp.nan)}

  def reconstruct(params, batch):
    return levels.to_uint8(apply(params, batch)[1])

  return task.Task(
    init,
    loss_fn,
    {"measure": measure, "reconstruct": reconstruct},
    draw,
    trainable=(("mix/gain", False), (".*", True)),
  )


_DATA = {"source": "synthetic", "frames": 2, "height": 8, "width": 8}
_CONFIG = {
  "task": "linear",
  "seed": 3,
  "steps": 6,
  "batch_size": 8,
  "log_every": 1,
  "save_every": 2,
  "keep": 2,
  "accumulate": 1,
  "history": False,
  "ema": {"decay": 0.9, "ramp": "ratio", "steps": 10},
  "model": {"blow": 1.0},
  "optim": {
    "name": "adamw",
    "lr": 1e-2,
    "warmup": 2,
    "schedule": "cosine",
    "final": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "clip": 1.0,
    "decay": 0.01,
    "decay_mask": ((".*kernel", True), (".*", False)),
  },
  "mesh": {"data": 2, "fsdp": 4},
  "sharding": ((".*", "fsdp"),),
  "data": _DATA,
  "val": {"data": _DATA, "batches": 2, "batch_size": 8, "every": 3},
}


@pytest.fixture
def config(monkeypatch):
  """A config of the task "linear", which exists in this test only."""
  monkeypatch.setattr(step, "TASKS", {**step.TASKS, "linear": _linear})
  return copy.deepcopy(_CONFIG)
