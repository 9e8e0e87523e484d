"""Measures a model of the tiny captioned world on held-out scenes.

  dcvideogen evaluate tiny --model=tiny --prompts=200 --output=out/scenes.json

A text- or image-to-video model makes a video for each held-out prompt. Colour,
shape and motion are read from the pixels. The share of videos in which they
match the prompt is printed, and written with all settings; `out/scenes.png`
shows the first videos.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from dcvideogen_jax.programs import evaluate_flags

_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  "Model to measure, as for `dcvideogen sample`: tiny, which ships, a directory"
  " in a published layout, or a Hugging Face repository owner/name@revision.",
)
_TASK = flags.DEFINE_enum(
  "task",
  "t2v",
  ["t2v", "i2v"],
  "t2v is text to video; i2v also gives the model the first frame.",
)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder",
  None,
  "Weights of DC-AE-V. Unset: those in the model's directory.",
)
_PROMPTS = flags.DEFINE_integer(
  "prompts",
  200,
  "Number of held-out prompts. The first N of a fixed list are used.",
  lower_bound=1,
)
_STEPS = flags.DEFINE_integer(
  "steps", 20, "Number of solver steps per video.", lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
  "guidance",
  3.0,
  "Scale of classifier-free guidance; 1 turns guidance off.",
)
_SHIFT = flags.DEFINE_float(
  "shift",
  None,
  "Shift of the noise levels. Unset: that of the checkpoint's scheduler.",
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt",
  None,
  "Negative prompt of the guidance. Unset: Wan's own.",
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Number that is added to each prompt's own noise seed.",
  lower_bound=0,
)
_SIZE = flags.DEFINE_list(
  "size",
  ["16", "64", "64"],
  "Frames, height and width of the videos; height and width in pixels.",
)
_AT_END = flags.DEFINE_bool(
  "at_end",
  False,
  "Read colour, shape and motion from the last 16 frames of a longer video"
  " instead of the first 16.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  25,
  "Number of videos that are sampled together. Image to video always takes one"
  " at a time.",
  lower_bound=1,
)


def main(argv: Sequence[str]) -> None:
  """Makes and reads a video for each prompt; prints and writes the scores."""
  del argv
  with evaluate_flags.report() as report:
    size = evaluate_flags.read_size(_SIZE.value)
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
