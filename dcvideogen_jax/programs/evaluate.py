"""Measures a model on what no training has seen.

  python -m launch.prepare_clips --split=heldout --output=out/heldout
  python -m launch.evaluate --model=tiny --clips=out/heldout/frames16 \\
    --output=out/evaluate.json

An autoencoder, on clips: PSNR and SSIM by the official definitions (uint8
frames, range 255), averaged over the frames of all clips.

  python -m launch.evaluate --what=semantic --model=tiny --prompts=200 \\
    --output=out/semantic.json

A text- or image-to-video model of the captioned world, on held-out prompts: how
often colour, shape and motion, read from the pixels, are what was asked for.
`out/semantic.png` shows the first videos.

Prints the numbers and writes them with all settings.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
import tqdm
from absl import flags

from dcvideogen_jax import convert, errors, files, levels, provenance
from dcvideogen_jax.data import records
from dcvideogen_jax.eval import contact_sheet, images
from dcvideogen_jax.programs import common
from dcvideogen_jax.sample import loading, model_names, pipeline
from dcvideogen_jax.tiny import evaluation

_WHAT = flags.DEFINE_enum(
  "what",
  "reconstruction",
  ["reconstruction", "semantic"],
  "Of an autoencoder, or of a model of the captioned world.",
)
_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  'Weights of an autoencoder: "tiny", a directory, a .pt or a .safetensors; or'
  ' a whole model, as for launch.sample: "tiny", a directory, a repository.',
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file.", required=True)
# Of reconstructions.
_CONFIG = flags.DEFINE_string("config", None, common.CONFIG_HELP)
_CLIPS = flags.DEFINE_string(
  "clips", None, "Folder of clips, from launch.prepare_clips."
)
# Of generated videos.
_TASK = flags.DEFINE_enum(
  "task", "t2v", ["t2v", "i2v"], "Text to video, or from a first frame too."
)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder", None, "Where the model's directory has none."
)
_PROMPTS = flags.DEFINE_integer(
  "prompts", 200, "How many, always the same ones.", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 20, "Of the solver.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Scale; 1 is none.")
_SHIFT = flags.DEFINE_float(
  "shift", None, "Of the noise levels. Unset: the checkpoint's."
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", None, "What guidance leads away from. Unset: Wan's own."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Added to each prompt's own.", lower_bound=0
)
_SIZE = flags.DEFINE_list(
  "size", ["16", "64", "64"], "Frames, height and width of the videos."
)
_AT_END = flags.DEFINE_bool(
  "at_end", False, "Of longer videos read the last 16 frames, not the first."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 25, "Videos that are made at once.", lower_bound=1
)


# What says nothing of another --what.
_ONLY = {
  "reconstruction": (_CLIPS, _CONFIG),
  "semantic": (_AT_END,),
}


def main(argv: Sequence[str]) -> None:
  """Measures, prints and writes."""
  del argv
  for what, only in _ONLY.items():
    for flag in only:
      if what != _WHAT.value and flag.value != flag.default:
        raise errors.UserError(f"--{flag.name} belongs to --what={what}")
  output = pathlib.Path(_OUTPUT.value)
  if output.is_dir():
    raise errors.UserError(
      f"--output={output} is a directory, expected a JSON file"
    )
  with common.output_directory(output.parent):
    if _WHAT.value == "semantic":
      report = _generation(output.with_suffix(".png"))
    else:
      report = _reconstruction()
    with files.atomic(output) as path:
      path.write_text(provenance.to_json(report), encoding="utf-8")


def _reconstruction() -> dict[str, Any]:
  """Reconstructs each clip whole and averages."""
  if _CLIPS.value is None:
    raise errors.UserError("--what=reconstruction needs --clips, found none")
  clips = records.ClipSource(_CLIPS.value)
  if not len(clips):
    raise errors.UserError(f"{_CLIPS.value} holds no clips")
  module, variables = convert.load(
    "dc_ae_v",
    model_names.weights(_MODEL.value),
    model_names.config(_CONFIG.value),
  )

  @functools.partial(jax.jit, static_argnums=1)
  def reconstruct(video, frames):
    latents = module.apply(variables, levels.to_float(video), method="encode")
    return module.apply(variables, latents, method="decode")[:, :frames]

  values: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
  for i in tqdm.trange(len(clips), unit="clip", disable=None):
    video = clips[i]["video"]
    frames, height, width = video.shape[:3]
    output = reconstruct(video[None], frames)
    output = levels.to_uint8(np.asarray(output)[0, :, :height, :width])
    values["psnr"].append(images.psnr(video, output))
    values["ssim"].append(images.ssim(video, output))
  means = {name: float(np.mean(x)) for name, x in values.items()}
  print(
    f"{len(clips)} clips of {frames} frames:"
    f" PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}"
  )
  return {
    "model": _MODEL.value,
    "clips": len(clips),
    "shape": [*video.shape],
    **means,
    "psnr_by_clip": [float(np.mean(x)) for x in values["psnr"]],
    "config": convert.config_of(module),
  }


def _generation(picture: pathlib.Path) -> dict[str, Any]:
  """Makes a video for each prompt and reads what it shows."""
  size = _read_size(_SIZE.value)
  parts = loading.load(
    model_names.pipeline(_MODEL.value),
    task=_TASK.value,
    autoencoder=_AUTOENCODER.value,
  )
  found = evaluation.score(
    pipeline.DCVideoGen(parts),
    _PROMPTS.value,
    _BATCH_SIZE.value,
    _SEED.value,
    size,
    _AT_END.value,
    steps=_STEPS.value,
    guidance_scale=_GUIDANCE.value,
    shift=_SHIFT.value,
    negative_prompt=_NEGATIVE.value,
  )
  with files.atomic(picture) as path:
    PIL.Image.fromarray(contact_sheet.strips(found.shown)).save(path)
  shares = ", ".join(f"{k} {100 * x:.1f} %" for k, x in found.accuracy.items())
  print(f"{_PROMPTS.value} held-out prompts: {shares}")
  seconds = ", ".join(f"{k} {x:.3f} s" for k, x in found.seconds.items())
  print(f"per video: {found.tokens} tokens, {seconds}")
  return {
    "model": _MODEL.value,
    "prompts": _PROMPTS.value,
    "accuracy": found.accuracy,
    "tokens_per_video": found.tokens,
    "seconds_per_video": found.seconds,
    "settings": {**found.settings, "prompts": None, "seeds": None},
    "videos": found.videos,
    "versions": provenance.versions(),
  }


def _read_size(given: Sequence[str]) -> tuple[int, int, int]:
  try:
    frames, height, width = (int(n) for n in given)
  except ValueError as e:
    raise errors.UserError(
      f"--size must be frames,height,width, found {','.join(given)}"
    ) from e
  return frames, height, width
