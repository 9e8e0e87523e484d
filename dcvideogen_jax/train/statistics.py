"""What diffusion models need to know of an autoencoder's latents: their scale.

DC-AE-V has one factor, about 1 / RMS (0.7241 for the released f32t4c32); Wan's
autoencoder has a mean and a standard deviation per channel. The deviations of
the released one are alike (1.1 to 3.3); those of one trained for an hour are
not, 0.13 to 1.5. Divided each by its own, the weak channels, which the decoder
hardly looks at, would be most of what a transformer learns. So one standard
deviation is used for all channels.
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

_DIGITS = 4


def measure(
  config: Mapping[str, Any], module: Any, params: Any
) -> Mapping[str, Any]:
  """`describe` on the training data of a run.

  Args:
    config: of the run. "statistics" is the number of batches that are encoded,
      0 for none.
    module: as for `describe`.
    params: its parameters.

  Returns:
    Fields of the module, {} for runs of other tasks or without batches.

  Raises:
    errors.UserError: if the data cannot be read.
  """
  count = config.get("statistics", 0)
  if not count or config["task"] not in ("autoencoder", "wan_autoencoder"):
    return {}
  batches = pipeline.batches(
    config["data"], batch_size=config["batch_size"], seed=config["seed"]
  )
  with contextlib.closing(batches):
    videos = (batch["video"] for batch in itertools.islice(batches, count))
    return describe(module, params, videos)


def describe(
  module: dc_ae_v.DCAEV | wan_vae.WanVAE,
  params: Any,
  videos: Iterable[UInt8[np.ndarray, "b t h w 3"]],
) -> dict[str, Any]:
  """What makes the latents of an autoencoder standard.

  Args:
    module: the autoencoder.
    params: its parameters.
    videos: batches of clips. Wan's leaves out frames that fill no latent frame.

  Returns:
    "latent_scale" of DC-AE-V, with which the mean square is 1. Of Wan's the
    "mean" per channel, and "std", that of all channels, once for each.
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
