"""Measures the scale of an autoencoder's latents, for diffusion models.

DC-AE-V has one scale for all channels, about 1 / RMS of the latents (0.7241 for
the released f32t4c32). Wan's autoencoder has a mean and a standard deviation
(std) per channel. The stds of the released one are similar (1.1 to 3.3), but
those of one that was trained for an hour range from 0.13 to 1.5. Normalising
each channel by its own std would then amplify weak channels, which the decoder
hardly uses, and a transformer would mostly learn those. So one std is used for
all channels.
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import levels
from dcvideogen_jax.data import pipeline
from dcvideogen_jax.models import dc_ae_v, wan_vae
from dcvideogen_jax.train import autoencoder_phases, fast_decoder, inflation

_DIGITS = 4


def measure(
  config: Mapping[str, Any], module: Any, params: Any
) -> Mapping[str, Any]:
  """Applies `describe` to the training data of a run.

  Where the encoder is frozen, the scale is that of the model that it is of.

  Args:
    config: of the run. "statistics" is the number of batches of clips to
      encode, 0 for none.
    module: the run's autoencoder.
    params: its parameters.

  Returns:
    Fields of the module; {} for runs of other tasks or with 0 batches.

  Raises:
    errors.UserError: if the data cannot be read.
  """
  if config["task"] not in ("autoencoder", "wan_autoencoder"):
    return {}
  phase = autoencoder_phases.find(config.get("phase", "pixels"))
  path, moved = config["weights"], config["start"] in inflation.STARTS
  if phase.keeps_latents and path and not moved:
    return {"latent_scale": fast_decoder.latent_scale(config)}
  count = config.get("statistics", 0)
  if not count or phase.smaller:
    return {}
  data = {k: v for k, v in config["data"].items() if k != "images"}
  batches = pipeline.batches(
    data, batch_size=config["batch_size"], seed=config["seed"]
  )
  with contextlib.closing(batches):
    videos = (batch["video"] for batch in itertools.islice(batches, count))
    return describe(module, params, videos)


def describe(
  module: dc_ae_v.DCAEV | wan_vae.WanVAE,
  params: Any,
  videos: Iterable[UInt8[np.ndarray, "b t h w 3"]],
) -> dict[str, Any]:
  """Measures the fields that normalise the latents of an autoencoder.

  Args:
    module: the autoencoder.
    params: its parameters.
    videos: batches of clips. Wan's autoencoder leaves out the last frames if
      they do not fill a latent frame.

  Returns:
    For DC-AE-V "latent_scale", which scales the latents to a mean square of 1.
    For Wan's autoencoder "mean" per channel, and "std", the standard deviation
    over all channels, repeated for each channel.
  """

  @jax.jit
  def moments(video):
    video = levels.to_float(video)
    if isinstance(module, wan_vae.WanVAE):
      video = video[:, : module.whole_frames(video.shape[1], "official")]
    latents = module.apply({"params": params}, video, method="encode")
    if isinstance(module, wan_vae.WanVAE):
      latents = latents.mean
    latents = latents.astype(jnp.float32)
    axes = (0, 1, 2, 3)
    return jnp.stack([latents.mean(axes), jnp.square(latents).mean(axes)])

  each = [np.asarray(moments(video), np.float64) for video in videos]
  mean, square = np.mean(each, axis=0)
  if isinstance(module, dc_ae_v.DCAEV):
    return {"latent_scale": round(float(square.mean() ** -0.5), _DIGITS)}
  std = np.full_like(mean, np.sqrt((square - mean**2).mean()))
  return {
    name: tuple(round(float(x), _DIGITS) for x in values)
    for name, values in (("mean", mean), ("std", std))
  }
