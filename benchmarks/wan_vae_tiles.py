"""The blended spatial tiles of diffusers' `AutoencoderKLWan`.

Overlapping tiles are computed separately, streamed in time, and cross-faded.
They need the memory of one tile only, but the result differs from that of the
whole frame: near the seams, and everywhere because of attention. Follows
diffusers `autoencoder_kl_wan.py` (commit 58eb52c); see `blended`.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks import blended
from dcvideogen_jax.models import wan_vae

Variables = dict[str, Any]


def encode(
  module: wan_vae.WanVAE,
  variables: Variables,
  video: Float[np.ndarray, "b t h w 3"],
  *,
  tile: int = 256,
  stride: int = 192,
) -> wan_vae.Posterior:
  """Encodes a whole clip in tiles.

  Args:
    module: the model.
    variables: `{"params": ...}`.
    video: float in [-1, 1], 1 + 4k frames; height and width multiples of
      `spatial_factor`.
    tile: side of a tile in pixels, a multiple of `spatial_factor`.
    stride: pixels from one tile to the next, a multiple of `spatial_factor`.

  Raises:
    errors.UserError: if the number of frames is not 1 + 4k.
  """

  def run(piece):
    parts = wan_vae.stream_encode(module, variables, [piece])
    parts = [np.concatenate(part, axis=-1) for part in parts]
    return np.concatenate(parts, axis=1)

  moments = blended.tiled(
    np.asarray(video),
    run,
    tile=tile,
    stride=stride,
    out_stride=stride // module.spatial_factor,
    blend=(tile - stride) // module.spatial_factor,
  )
  return wan_vae.Posterior(*np.split(moments, 2, axis=-1))


def decode(
  module: wan_vae.WanVAE,
  variables: Variables,
  latents: Float[np.ndarray, "b tz hz wz c"],
  *,
  tile: int = 256,
  stride: int = 192,
) -> Float[np.ndarray, "b t h w 3"]:
  """Decodes a whole clip in tiles; the video is not clamped.

  Args:
    module: the model.
    variables: `{"params": ...}`.
    latents: the latents of the clip.
    tile: side of a tile in pixels of the video, as for `encode`.
    stride: pixels of the video from one tile to the next, as for `encode`.
  """

  def run(piece):
    parts = wan_vae.stream_decode(module, variables, [piece])
    return np.concatenate([*parts], axis=1)

  return blended.tiled(
    np.asarray(latents),
    run,
    tile=tile // module.spatial_factor,
    stride=stride // module.spatial_factor,
    out_stride=stride,
    blend=tile - stride,
  )
