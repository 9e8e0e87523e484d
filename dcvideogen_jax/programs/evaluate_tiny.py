"""Measures a model of the tiny captioned world on held-out scenes.

  dcvideogen evaluate tiny --model=tiny --prompts=200 --output=out/scenes.json

A text- or image-to-video model makes a video for each held-out prompt. Colour,
shape and motion are read from the pixels. The share of videos in which they
match the prompt is printed, and written with all settings; `out/scenes.png`
shows the first videos.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, evaluate_flags

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
_LORA = flags.DEFINE_multi_string(
  "lora", [], "LoRA to merge into the transformer, as for `dcvideogen sample`."
)
_FEW = flags.DEFINE_string(
  "few",
  None,
  "Sample in a few evaluations, without guidance and instead of --steps: own,"
  " with the few-step LoRA that the model brings, or a preset's name.",
)
_LEVELS = flags.DEFINE_list(
  "levels",
  None,
  "Noise levels from 1 down, instead of those of --steps and --shift.",
)
_SOLVER = flags.DEFINE_string(
  "solver", None, "Solver. Unset: that of the checkpoint's scheduler."
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
_SEEDS = flags.DEFINE_integer(
  "seeds",
  1,
  "Number of videos of each prompt, with seeds of their own. From 2 on, the"
  " spread of position and size over the videos of a prompt is measured too.",
  lower_bound=1,
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


def _how(source: str, loras: list[Any]) -> dict[str, Any]:
  """Returns how to sample; adds a model's own few-step LoRA to `loras`.

  Raises:
    errors.UserError: for flags that contradict each other, or as
      `few_steps.own` and `few_steps.preset`.
  """
  if _FEW.value is None and _LEVELS.value is None and _SOLVER.value is None:
    return {
      "steps": _STEPS.value,
      "guidance_scale": _GUIDANCE.value,
      "shift": _SHIFT.value,
    }
  from dcvideogen_jax.sample import few_steps, model_names

  settled = ["steps", "shift"]
  if _FEW.value is None:
    if _LEVELS.value is None or _SOLVER.value is None:
      raise errors.UserError("--levels and --solver go together")
    common.refuse_flags(settled, "is settled by --levels")
    try:
      levels = tuple(map(float, _LEVELS.value))
    except ValueError as e:
      raise errors.UserError(f"--levels are numbers: {e}") from e
    return {
      "levels": levels,
      "solver": _SOLVER.value,
      "guidance_scale": _GUIDANCE.value,
    }
  common.refuse_flags(
    [*settled, "guidance", "levels", "solver"], "is settled by --few"
  )
  if _FEW.value == "own":
    choice = few_steps.own(source, _TASK.value)
    loras.append(model_names.LoraFile(str(choice.lora)))
  else:
    choice = few_steps.preset(_FEW.value)
  return {
    "levels": choice.steps.levels,
    "solver": choice.steps.solver,
    "guidance_scale": 1.0,
  }


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

    source = model_names.pipeline(_MODEL.value)
    loras = [model_names.lora(text) for text in _LORA.value]
    how = _how(source, loras)
    parts = loading.load(
      source,
      task=_TASK.value,
      autoencoder=_AUTOENCODER.value,
      change=functools.partial(model_names.with_loras, loras=loras)
      if loras
      else None,
    )
    if "solver" in how:
      changes = {key: how.pop(key) for key in ("solver", "levels")}
      how["options"] = parts.options._replace(solver_options={}, **changes)
    scores = evaluation.score(
      pipeline.DCVideoGen(parts),
      _PROMPTS.value,
      _BATCH_SIZE.value,
      _SEED.value,
      size,
      _AT_END.value,
      _SEEDS.value,
      **how,
      negative_prompt=_NEGATIVE.value,
    )
    picture = pathlib.Path(evaluate_flags.OUTPUT.value).with_suffix(".png")
    with files.atomic(picture) as path:
      PIL.Image.fromarray(contact_sheet.strips(scores.shown)).save(path)
    report |= {
      "model": _MODEL.value,
      "lora": _LORA.value,
      "few": _FEW.value,
      "prompts": _PROMPTS.value,
      "accuracy": scores.accuracy,
      **({"spread": scores.spread} if _SEEDS.value > 1 else {}),
      "tokens_per_video": scores.tokens,
      "seconds_per_video": scores.seconds,
      "settings": {**scores.settings, "prompts": None, "seeds": None},
      "videos": scores.videos,
      "versions": provenance.versions(),
    }
    shares = (f"{k} {100 * x:.1f} %" for k, x in scores.accuracy.items())
    print(f"{_PROMPTS.value} held-out prompts: {', '.join(shares)}")
    if _SEEDS.value > 1:
      spread = (f"{k} {x:.4f}" for k, x in scores.spread.items())
      print(f"spread over {_SEEDS.value} seeds: {', '.join(spread)}")
    seconds = ", ".join(f"{k} {x:.3f} s" for k, x in scores.seconds.items())
    print(f"per video: {scores.tokens} tokens, {seconds}")
