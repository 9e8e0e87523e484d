"""How well an autoencoder reconstructs clips that no training has seen."""

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
  """PSNR and SSIM by the official definitions: uint8 frames, range 255.

  Each clip is encoded and decoded whole, in the numbers the module computes in.

  Args:
    module, variables: an autoencoder with the methods "encode" and "decode".
    clips: one or more, whose "video" is uint8 `t h w 3`.

  Returns:
    "clips", how many; "shape" of the last; "psnr" in dB and "ssim", averages
    over the frames of each clip and then over clips; "psnr_by_clip".
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
