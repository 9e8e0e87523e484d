"""What is trained: each task is a named tuple of pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.train import initial, losses

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(NamedTuple):
  """What the loop needs to know about what it trains.

  init(rng) -> params.
  loss_fn(params, batch, rng) -> (loss, metrics), float32 scalars.
  predict_fns: name -> function(params, batch) -> arrays with a leading batch
    axis; "measure" gives the numbers of a validation, "reconstruct" a video.
  """

  init: Callable[[jax.Array], Any]
  loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
  predict_fns: Mapping[str, Callable[[Any, Batch], Any]]


def to_float(video: jax.Array) -> jax.Array:
  """uint8 "b t h w c" to float32 in [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1


def to_uint8(video: jax.Array) -> jax.Array:
  """Float in [-1, 1] to uint8, rounded and clipped."""
  return jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8)


def autoencoder(config: Mapping[str, Any]) -> Task:
  """Reconstruction with DC-AE-V.

  Args:
    config: "model" as `dc_ae_v.build` takes it, "loss", the weights of
      `losses.TERMS`, and "start", a key of `initial.STARTS`. Batches hold
      "video", uint8 "b t h w 3".

  Raises:
    errors.UserError: for a model or loss that cannot be built.
  """
  try:
    module = dc_ae_v.build(config["model"])
  except ValueError as e:
    raise errors.UserError(f"config.model: {e}") from e
  size = module.spatial_factor
  weights = dict(config["loss"])
  start = _choose("start", config["start"], initial.STARTS)

  def init(rng):
    example = jnp.zeros((1, module.temporal_factor, size, size, 3))
    return start(module.init(rng, example)["params"], module.time)

  def apply(params, batch):
    _require_multiples(batch["video"].shape, module.frames_multiple, size)
    video = to_float(sharding.constrain(batch["video"], "batch"))
    return video, module.apply({"params": params}, video).astype(jnp.float32)

  def loss_fn(params, batch, rng):
    del rng  # The autoencoder is deterministic.
    video, output = apply(params, batch)
    loss, terms = losses.weighted(output, video, weights)
    return loss, {"psnr": losses.psnr(output, video).mean(), **terms}

  def measure(params, batch):
    video, output = apply(params, batch)
    output = to_float(to_uint8(output))
    each = jax.vmap(lambda x, y: losses.ssim(x[None], y[None]))
    return {
      "psnr": losses.psnr(output, video),
      "ssim": each(output, video),
    }

  def reconstruct(params, batch):
    return to_uint8(apply(params, batch)[1])

  return Task(init, loss_fn, {"measure": measure, "reconstruct": reconstruct})


def _require_multiples(shape: tuple[int, ...], frames: int, size: int) -> None:
  """The model would pad such clips, and learn to reconstruct the padding."""
  _, t, h, w, _ = shape
  if t % frames or h % size or w % size:
    raise errors.UserError(
      f"the model needs clips of a multiple of {frames} frames and {size} "
      f"pixels, config.data gives {t} frames of {h}x{w}"
    )


def _choose(key: str, name: str, table: Mapping[str, Any]) -> Any:
  if name not in table:
    raise errors.UserError(
      f"{key} must be one of {', '.join(table)}, found {name!r}"
    )
  return table[name]


TASKS: Mapping[str, Callable[[Mapping[str, Any]], Task]] = {
  "autoencoder": autoencoder
}
