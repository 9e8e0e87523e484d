"""Asks a model of the captioned world for scenes it has not seen.

  dcvideogen evaluate tiny --model=tiny --prompts=200 --output=out/scenes.json

A text- or image-to-video model gets held-out prompts. How often colour, shape
and motion, read from the pixels, are what was asked for is printed and written
with all settings; `out/scenes.png` shows the first videos.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import evaluate_flags

_MODEL = flags.DEFINE_string(
  "model", "tiny", '"tiny", a directory, or a repository, as for sample.'
)
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


def main(argv: Sequence[str]) -> None:
  """Makes a video for each prompt, reads it, prints and writes."""
  del argv
  with evaluate_flags.report() as report:
    size = _read_size(_SIZE.value)
    import PIL.Image

    from dcvideogen_jax import files, provenance
    from dcvideogen_jax.eval import contact_sheet
    from dcvideogen_jax.sample import loading, model_names, pipeline
    from dcvideogen_jax.tiny import evaluation

    parts = loading.load(
      model_names.pipeline(_MODEL.value),
      task=_TASK.value,
      autoencoder=_AUTOENCODER.value,
    )
    scores = evaluation.score(
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
    picture = pathlib.Path(evaluate_flags.OUTPUT.value).with_suffix(".png")
    with files.atomic(picture) as path:
      PIL.Image.fromarray(contact_sheet.strips(scores.shown)).save(path)
    report |= {
      "model": _MODEL.value,
      "prompts": _PROMPTS.value,
      "accuracy": scores.accuracy,
      "tokens_per_video": scores.tokens,
      "seconds_per_video": scores.seconds,
      "settings": {**scores.settings, "prompts": None, "seeds": None},
      "videos": scores.videos,
      "versions": provenance.versions(),
    }
    shares = (f"{k} {100 * x:.1f} %" for k, x in scores.accuracy.items())
    print(f"{_PROMPTS.value} held-out prompts: {', '.join(shares)}")
    seconds = ", ".join(f"{k} {x:.3f} s" for k, x in scores.seconds.items())
    print(f"per video: {scores.tokens} tokens, {seconds}")


def _read_size(given: Sequence[str]) -> tuple[int, int, int]:
  try:
    frames, height, width = (int(n) for n in given)
  except ValueError as e:
    raise errors.UserError(
      f"--size must be frames,height,width, found {','.join(given)}"
    ) from e
  return frames, height, width
