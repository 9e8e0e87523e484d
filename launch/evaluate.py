"""Measures how well an autoencoder reconstructs held-out clips.

  python -m launch.prepare_clips --split=heldout --output=out/heldout
  python -m launch.evaluate --model=tiny --clips=out/heldout/frames16 \\
    --output=out/evaluate.json

Prints PSNR and SSIM, by the official definitions (uint8 frames, range 255),
averaged over the frames of all clips, and writes them with the settings.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags

from dcvideogen_jax import convert, errors, files
from dcvideogen_jax.data import records
from dcvideogen_jax.eval import images
from launch import _model, _program

_MODEL = flags.DEFINE_string(
  "model", "tiny", 'Weights: "tiny", a directory, a .pt or a .safetensors.'
)
_CONFIG = flags.DEFINE_string("config", None, _model.CONFIG_HELP)
_CLIPS = flags.DEFINE_string(
  "clips", None, "Folder of clips, from launch.prepare_clips.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file.", required=True)


def main(argv: Sequence[str]) -> None:
  """Reconstructs each clip whole and averages."""
  del argv
  clips = records.ClipSource(_CLIPS.value)
  if not len(clips):
    raise errors.UserError(f"{_CLIPS.value} holds no clips")
  module, variables = convert.load(
    "dc_ae_v", _model.weights(_MODEL.value), _model.config(_CONFIG.value)
  )

  @functools.partial(jax.jit, static_argnums=1)
  def reconstruct(video, frames):
    latents = module.apply(variables, video / 127.5 - 1, method="encode")
    return module.apply(variables, latents, method="decode")[:, :frames]

  values: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
  for i in tqdm.trange(len(clips), unit="clip", disable=None):
    video = clips[i]["video"]
    frames, height, width = video.shape[:3]
    output = reconstruct(video[None].astype(np.float32), frames)
    output = images.to_uint8(np.asarray(output)[0, :, :height, :width])
    values["psnr"].append(images.psnr(video, output))
    values["ssim"].append(images.ssim(video, output))
  means = {name: float(np.mean(x)) for name, x in values.items()}
  report = {
    "model": _MODEL.value,
    "clips": len(clips),
    "shape": [*video.shape],
    **means,
    "psnr_by_clip": [float(np.mean(x)) for x in values["psnr"]],
    "config": convert.config_of(module),
  }
  output = pathlib.Path(_OUTPUT.value)
  with _program.output_directory(output.parent), files.atomic(output) as path:
    path.write_text(json.dumps(report, indent=1) + "\n")
  print(
    f"{len(clips)} clips of {frames} frames:"
    f" PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}"
  )


if __name__ == "__main__":
  _program.run(main)
