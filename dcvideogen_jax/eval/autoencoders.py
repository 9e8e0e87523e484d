"""Measures how well an autoencoder reconstructs held-out clips."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from flax import linen as nn

from dcvideogen_jax import levels
from dcvideogen_jax.eval import images


def measure(
  module: nn.Module, variables: Any, clips: Sequence[dict[str, np.ndarray]]
) -> dict[str, Any]:
  """Measures PSNR and SSIM as the official evaluation does.

  Frames are quantised to uint8, range 255 (see `images`). Each clip is encoded
  and decoded whole, in the module's own dtype.

  Args:
    module: an autoencoder with the methods "encode" and "decode".
    variables: its parameters.
    clips: one or more, whose "video" is uint8 `t h w 3`.

  Returns:
    "clips", the number of clips; "shape", that of the last clip; "psnr" in dB
    and "ssim", averaged over the frames of each clip and then over clips;
    "psnr_by_clip".
  """

  @functools.partial(jax.jit, static_argnums=1)
  def reconstruct(video, frames):
    latents = module.apply(variables, levels.to_float(video), method="encode")
    return module.apply(variables, latents, method="decode")[:, :frames]

  psnr, ssim = [], []
  for i in tqdm.trange(len(clips), unit="clip", disable=None):
    video = clips[i]["video"]
    frames, height, width = video.shape[:3]
    output = reconstruct(video[None], frames)
    output = levels.to_uint8(np.asarray(output)[0, :, :height, :width])
    psnr.append(float(np.mean(images.psnr(video, output))))
    ssim.append(float(np.mean(images.ssim(video, output))))
  return {
    "clips": len(clips),
    "shape": [*video.shape],
    "psnr": float(np.mean(psnr)),
    "ssim": float(np.mean(ssim)),
    "psnr_by_clip": psnr,
  }
