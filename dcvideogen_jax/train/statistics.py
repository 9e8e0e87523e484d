"""What diffusion models need to know of an autoencoder's latents: their scale.

DC-AE-V has one factor, about 1 / RMS (0.7241 for the released f32t4c32); Wan's
autoencoder a mean and a standard deviation per channel. The released one's are
all alike (1.1 to 3.3). Those of one trained for an hour are not, 0.13 to 1.5;
divided each by its own, the weak channels, which the decoder hardly looks at,
become most of what a transformer has to learn. So all channels get one here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcvideogen_jax import levels
from dcvideogen_jax.data import pipeline
from dcvideogen_jax.models import dc_ae_v, wan_vae

Latents = Float[Array, "b t h w c"]
_DIGITS = 4


def deep(
  module: dc_ae_v.DCAEV, params: Any, videos: Iterable[Any]
) -> dict[str, float]:
  """The "latent_scale" of DC-AE-V that makes the mean square 1.

  Args:
    module: the model.
    params: its parameters.
    videos: batches of clips, uint8 "b t h w 3".
  """
  moments = _moments(
    lambda video: module.apply({"params": params}, video, method="encode"),
    videos,
  )
  return {"latent_scale": round(float(moments[1].mean() ** -0.5), _DIGITS)}


def wan(
  module: wan_vae.WanVAE, params: Any, videos: Iterable[Any]
) -> dict[str, tuple[float, ...]]:
  """The "mean" per channel of the latents of Wan's autoencoder, and the "std".

  The "std" is that of all channels together, written once for each.

  Args:
    module: the model.
    params: its parameters.
    videos: batches of clips, uint8 "b t h w 3"; frames that fill no latent
      frame are left out.
  """

  def encode(video):
    video = video[:, : module.whole_frames(video.shape[1], "official")]
    return module.apply({"params": params}, video, method="encode").mean

  mean, square = _moments(encode, videos)
  std = np.full_like(mean, np.sqrt((square - mean**2).mean()))
  return {
    name: tuple(round(float(x), _DIGITS) for x in values)
    for name, values in (("mean", mean), ("std", std))
  }


def _moments(
  encode: Callable[[Array], Latents], videos: Iterable[Any]
) -> np.ndarray:
  """Mean and mean square of each channel: (2, c), float64."""

  @jax.jit
  def moments(video):
    latents = encode(levels.to_float(video))
    latents = latents.astype(jnp.float32)
    axes = (0, 1, 2, 3)
    return jnp.stack([latents.mean(axes), jnp.square(latents).mean(axes)])

  found = [np.asarray(moments(video), np.float64) for video in videos]
  return np.mean(found, axis=0)


_MEASURES: Mapping[
  str, Callable[[Any, Any, Iterable[Any]], Mapping[str, Any]]
] = {"autoencoder": deep, "wan_autoencoder": wan}


def measure(
  config: Mapping[str, Any], module: Any, params: Any
) -> Mapping[str, Any]:
  """What describes the latents of a run's autoencoder.

  Args:
    config: of the run. "statistics" is the number of batches of its training
      data that are encoded, 0 for none.
    module: the autoencoder.
    params: its parameters.

  Returns:
    Fields of the module, {} for runs of other tasks or without batches.

  Raises:
    errors.UserError: if the data cannot be read.
  """
  count = config.get("statistics", 0)
  if not count or config["task"] not in _MEASURES:
    return {}
  batches = pipeline.batches(
    config["data"], batch_size=config["batch_size"], seed=config["seed"]
  )
  with contextlib.closing(batches):
    videos = (batch["video"] for batch in itertools.islice(batches, count))
    return _MEASURES[config["task"]](module, params, videos)
