"""The task that trains Wan's autoencoder, and what DC-AE-V's shares with it."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert, errors, levels, sharding
from dcvideogen_jax.models import precision, wan_vae
from dcvideogen_jax.train import losses, warm_starts
from dcvideogen_jax.train import task as task_lib


def wan_autoencoder(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task that trains Wan's autoencoder to reconstruct clips.

  Only the first 1 + k * `temporal_factor` frames of a clip are used, for the
  largest k that fits. The loss decodes a sample of the posterior; validation
  decodes its mean.

  Args:
    config: "model", the fields that `wan_vae.build` takes; "loss", the weight
      of each term of `losses.TERMS` and of "kl", the divergence from the
      standard normal distribution; "start", a key of `warm_starts.WAN_STARTS`;
      "weights" as for `autoencoder`.

  Raises:
    errors.UserError: for a model or loss that cannot be built.
  """
  module = build(wan_vae.build, config["model"])
  size = module.spatial_factor
  weights = dict(config["loss"])
  kl_weight = weights.pop("kl", 0.0)
  start = errors.choose("start", config["start"], warm_starts.WAN_STARTS)

  def init(rng):
    example = jnp.zeros((1, 1 + module.temporal_factor, size, size, 3))
    return start(module.init(rng, example)["params"])

  def draw(batch: task_lib.VideoBatch, rng) -> task_lib.VideoBatch:
    b, t, h, w, _ = batch["video"].shape
    if h % size or w % size:
      raise errors.UserError(
        f"the model needs clips of a multiple of {size} pixels, config.data "
        f"gives {h}x{w}"
      )
    frames = 1 + (module.whole_frames(t, "official") - 1) // (
      module.temporal_factor
    )
    shape = (b, frames, h // size, w // size, module.latent_channels)
    return {**batch, "noise": jax.random.normal(rng, shape)}

  def whole(params):
    # XLA adds up wrongly if the image columns and the input channels of a
    # kernel are both sharded. `ops.conv3d` avoids this itself, but Wan's
    # resampling convolutions do not use it, so the kernels are replicated here.
    return {"params": jax.tree.map(sharding.constrain, params)}

  def encode(params, batch: task_lib.VideoBatch):
    frames = module.whole_frames(batch["video"].shape[1], "official")
    video = video_of(batch)[:, :frames]
    return video, module.apply(whole(params), video, method="encode")

  def decode(params, latents):
    video = module.apply(whole(params), latents, method="decode")
    return video.astype(jnp.float32)

  def loss_fn(params, drawn: task_lib.VideoBatch):
    with as_fast_as_can_be():
      video, posterior = encode(params, drawn)
      mean, logvar = (x.astype(jnp.float32) for x in posterior)
      latents = mean + jnp.exp(logvar / 2) * drawn["noise"]
      output = decode(params, latents)
    loss, terms = losses.weighted(output, video, weights)
    kl = losses.kl(mean, logvar)
    metrics = {"psnr": losses.psnr(output, video).mean(), "kl": kl, **terms}
    return loss + kl_weight * kl, metrics

  def reconstruct(params, batch: task_lib.VideoBatch):
    video, posterior = encode(params, batch)
    return video, decode(params, posterior.mean)

  return task_lib.Task(
    init,
    loss_fn,
    predictions(reconstruct),
    draw,
    start=reading("wan_vae", module, config["weights"]),
  )


def as_fast_as_can_be() -> contextlib.AbstractContextManager[Any]:
  """Computes float32 products at the device's default precision, both ways.

  They may then run in half precision, in which others train such models
  entirely. Validation and exports keep the precision that the models choose.
  """
  return precision.unless_set("default")


def video_of(batch: task_lib.VideoBatch) -> losses.Video:
  """Returns the clips in [-1, 1], sharded over the mesh as the models do."""
  video = sharding.constrain(batch["video"], "batch", None, None, "columns")
  return levels.to_float(video)


def reading(
  kind: str, module: Any, path: str | None
) -> Callable[[Any], Any] | None:
  """Returns where -> a model's parameters from a file; None without a path."""
  if path is None:
    return None

  def start(where):
    _, variables = convert.load(
      kind,
      path,
      config=convert.config_of(module),
      dtype=jnp.float32,
      sharding={"params": where},
    )
    return variables["params"]

  return start


def predictions(
  reconstruct: Callable[
    [Any, task_lib.VideoBatch], tuple[losses.Video, losses.Video]
  ],
  more: Callable[
    [Any, losses.Video, losses.Video], Mapping[str, jax.Array]
  ] = lambda variables, output, video: {},
) -> Mapping[str, Callable[[Any, task_lib.VideoBatch], Any]]:
  """Builds `predict_fns`.

  Args:
    reconstruct: (variables, batch) -> (video, reconstruction).
    more: (variables, reconstruction in whole levels, video) -> further metrics.
  """

  def measure(params, batch):
    video, output = reconstruct(params, batch)
    output = levels.to_float(levels.to_uint8(output))
    each = jax.vmap(lambda x, y: losses.ssim(x[None], y[None]))
    return {
      "psnr": losses.psnr(output, video),
      "ssim": each(output, video),
      **more(params, output, video),
    }

  def show(params, batch):
    return levels.to_uint8(reconstruct(params, batch)[1])

  return {"measure": measure, "reconstruct": show}


def build(
  builder: Callable[[Any], Any],
  fields: Mapping[str, Any],
  section: str = "config.model",
) -> Any:
  """Builds a model from a section of a config.

  Raises:
    errors.UserError: if the fields do not fit.
  """
  try:
    return builder(fields)
  except ValueError as e:
    raise errors.UserError(f"{section}: {e}") from e
