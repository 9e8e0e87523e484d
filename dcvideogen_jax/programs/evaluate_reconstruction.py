"""Measures an autoencoder on held-out clips.

  dcvideogen prepare-clips --split=heldout --output=out/heldout
  dcvideogen evaluate reconstruction --model=tiny \\
    --clips=out/heldout/frames16 --output=out/reconstruction.json

Prints PSNR and SSIM, averaged over the frames of all clips, and writes them
with all settings. Both follow the official definitions (uint8 frames, range
255).
"""

from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, evaluate_flags

_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  "Weights of the autoencoder: tiny, which ships, a directory, or a .pt or"
  " .safetensors file.",
)
_CONFIG = flags.DEFINE_string("config", None, common.CONFIG_HELP)
_CLIPS = flags.DEFINE_string(
  "clips",
  None,
  "Folder of clips that `dcvideogen prepare-clips` wrote.",
  required=True,
)


def main(argv: Sequence[str]) -> None:
  """Reconstructs each clip as a whole; prints and writes the averages.

  Raises:
    errors.UserError: if the folder holds no clips.
  """
  del argv
  with evaluate_flags.report() as report:
    from dcvideogen_jax import convert
    from dcvideogen_jax.data import records
    from dcvideogen_jax.eval import autoencoders
    from dcvideogen_jax.sample import model_names

    clips = records.ClipSource(_CLIPS.value)
    if not len(clips):
      raise errors.UserError(f"{_CLIPS.value} holds no clips")
    module, variables = convert.load(
      "dc_ae_v",
      model_names.weights(_MODEL.value),
      model_names.config(_CONFIG.value),
    )
    report["model"] = _MODEL.value
    report |= autoencoders.measure(module, variables, clips)
    report["config"] = convert.config_of(module)
    print(
      f"{len(clips)} clips of {report['shape'][0]} frames: PSNR "
      f"{report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}"
    )
