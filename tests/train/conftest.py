"""A task and a config small enough to train in a test many times."""

import copy

import jax
import jax.numpy as jnp
import pytest

from dcvideogen_jax.train import tasks


def _linear(config):
  """Reconstructs each pixel from noisy neighbours, so that rng matters."""

  def init(rng):
    return {"mix": {"kernel": jax.random.normal(rng, (8 * 3, 8 * 3)) / 5}}

  def apply(params, batch):
    video = tasks.to_float(batch["video"])
    rows = video.reshape(*video.shape[:3], -1)
    return video, (rows @ params["mix"]["kernel"]).reshape(video.shape)

  def loss_fn(params, batch, rng):
    video, output = apply(params, batch)
    noise = jax.random.normal(rng, output.shape)
    error = output + 0.1 * noise - video
    # A finite loss whose extra metric can be made to blow up.
    return jnp.square(error).mean(), {"blow": jnp.exp(config["model"]["blow"])}

  def measure(params, batch):
    video, output = apply(params, batch)
    return {"psnr": -jnp.square(video - output).mean((1, 2, 3, 4))}

  def reconstruct(params, batch):
    return tasks.to_uint8(apply(params, batch)[1])

  return tasks.Task(
    init, loss_fn, {"measure": measure, "reconstruct": reconstruct}
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
  "ema": 0.9,
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
  monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "linear": _linear})
  return copy.deepcopy(_CONFIG)
