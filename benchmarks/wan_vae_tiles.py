"""The blended spatial tiles of diffusers' `AutoencoderKLWan`.

Overlapping tiles are computed on their own, streamed in time, and cross-faded:
memory is that of one tile, but the result differs from the whole frame's near
the seams and, through attention, everywhere. Follows diffusers
`autoencoder_kl_wan.py` (commit 58eb52c); see `blended`.
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
    tile: pixels of a tile's side, a multiple of `spatial_factor`.
    stride: pixels from one tile to the next, likewise.

  Raises:
    errors.UserError: if the frames do not fit.
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
  """Decodes a whole clip, unclamped; `tile` and `stride` in pixels."""

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
