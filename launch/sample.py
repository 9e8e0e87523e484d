"""Makes videos from prompts, and from images.

  python -m launch.sample --model=tiny --prompt="a red ball rolls" --output=out
  python -m launch.sample --config=configs/sample.py:dc-i2v-14b,size=720p \\
    --prompt="..." --image=photo.jpg --seeds=0,1 --output=out

Writes per prompt and seed `{index}_{prompt}_seed{seed}`
  .mp4    with its settings in the comment tag
  .png    a contact sheet
  .json   settings, versions, seconds per phase, memory
"""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import convert, errors, files, memory
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import (
  generation,
  loading,
  pipeline,
  sizes,
  weights_cache,
)
from launch import _clock, _model, _program, _report, _requests, _sheet

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file and, after a colon, its argument: a model and maybe a size."
  " Unset: configs/sample.py:tiny.",
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  '"tiny", a directory as published, or a Hugging Face repository'
  ' "owner/name@revision". Unset: as the config has it.',
)
_TASK = flags.DEFINE_enum(
  "task",
  None,
  ["t2v", "i2v"],
  "Text or image to video. Unset: i2v if there is an --image, else as the"
  " config has it.",
)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder", None, "DC-AE-V, where the model's directory has none."
)
_IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder", None, "CLIP, where the model's directory has none."
)
_LORA = flags.DEFINE_multi_string(
  "lora", [], "A LoRA file, and after a comma its scale; several add up."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show.")
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "A file with a prompt per line, or .jsonl with objects: prompt,"
  " negative_prompt, image, last_image, seed.",
)
_IMAGE = flags.DEFINE_string("image", None, "The first frame.")
_LAST_IMAGE = flags.DEFINE_string("last_image", None, "The last frame.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "A video for each.")
_NOISE = flags.DEFINE_string(
  "noise", None, "A .npy with the noise `t h w c`, instead of the seeds."
)
_OUTPUT = flags.DEFINE_string("output", None, "A directory.", required=True)
_ONE_PROGRAM = flags.DEFINE_bool(
  "one_program", False, "Run all steps as one program, without progress."
)
_FREE_TEXT_ENCODER = flags.DEFINE_bool(
  "free_text_encoder", False, "Give its memory back once all texts are read."
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "For encoding and decoding, beyond the weights. Unset: four fifths of what is"
  " free.",
  lower_bound=1e-6,
)
_CRF = flags.DEFINE_integer(
  "crf",
  18,
  "Quality of the mp4 files, 0 the best.",
  lower_bound=0,
  upper_bound=51,
)
_WEIGHTS_CACHE = flags.DEFINE_bool(
  "weights_cache",
  True,
  "Keep converted weights of large models in the user's cache directory.",
)

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_SHEET_FRAMES = 8
_DTYPES = {None: None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def main(argv: Sequence[str]) -> None:
  """Checks, loads, samples, writes."""
  del argv
  clock = _clock.Clock()
  c = _CONFIG.value
  requests = _requests.gather(
    _PROMPT.value, _PROMPTS.value, _SEEDS.value, _IMAGE.value, _LAST_IMAGE.value
  )
  task = _TASK.value or ("i2v" if requests[0].image else c.task)
  _check(c, requests, task)
  noise = _read_noise(_NOISE.value)
  with _program.output_directory(_OUTPUT.value) as output:
    with clock.phase("load"):
      made = _load(c, task)
    if _FREE_TEXT_ENCODER.value:
      with clock.phase("text"):
        _read_texts(made, c, requests)
      made.free_text_encoder()
    for index, request in enumerate(requests):
      print(f"{index + 1} of {len(requests)}: {request.prompt}", flush=True)
      path = output / request.name(index)
      _make(made, c, request, noise, path, clock)
      clock.restart("load")


def _check(c: Any, requests: list[_requests.Request], task: str) -> None:
  """Refuses, before anything is loaded, what is sure to fail later.

  Raises:
    errors.UserError: says what is wrong.
  """
  sizes.check(sizes.Size(c.frames, c.height, c.width))
  if c.dtype not in _DTYPES:
    raise errors.UserError(
      f"config.dtype must be float32 or bfloat16, found {c.dtype!r}"
    )
  for request in requests:
    if task == "i2v" and request.image is None:
      raise errors.UserError(
        f"image to video needs an image, and {request.prompt!r} has none"
      )
    if task == "t2v" and (request.image or request.last_image):
      raise errors.UserError(
        f"text to video takes no image, and {request.prompt!r} has one"
      )


def _read_noise(path: str | None) -> np.ndarray | None:
  if path is None:
    return None
  try:
    return np.load(path, allow_pickle=False)[None]
  except (OSError, ValueError, EOFError) as e:
    raise errors.UserError(f"--noise={path} is no .npy file: {e}") from e


def _load(c: Any, task: str) -> pipeline.DCVideoGen:
  source = _model.pipeline(_MODEL.value or c.model)
  print(f"loading {source} for {task}", flush=True)
  load = convert.load
  if _WEIGHTS_CACHE.value:
    load = weights_cache.caching(_program.cache_directory() / "weights")
  parts = loading.load(
    source,
    task=task,
    autoencoder=_AUTOENCODER.value,
    image_encoder=_IMAGE_ENCODER.value,
    dtype=_DTYPES[c.dtype],
    load_model=load,
  )
  for text in _LORA.value:
    parts = _with_lora(parts, text)
  return pipeline.DCVideoGen(parts, _program.cache_directory() / "programs")


def _with_lora(parts: loading.Parts, text: str) -> loading.Parts:
  path, _, scale = text.partition(",")
  try:
    scale = float(scale or 1)
  except ValueError as e:
    raise errors.UserError(
      f"--lora={text}: expected a number after the comma"
    ) from e
  module, variables = parts.transformer
  updates = convert.load_lora("wan_dit", path, module, scale)
  print(f"{path}: {updates}", flush=True)
  params = convert.merge(variables["params"], updates, donate=True)
  return parts._replace(transformer=loading.Part(module, {"params": params}))


def _read_texts(made, c, requests):
  for request in requests:
    made.embed([request.prompt])
    made.embed([_negative(made, c, request)])


def _negative(made, c, request):
  given = (request.negative_prompt, c.negative_prompt, made.negative_prompt())
  return next(text for text in given if text is not None)


def _options(made, c):
  """The checkpoint's solver and grid, with the config's changes."""
  changes = {"solver": c.solver, "grid": c.grid}
  options = made.parts.options._replace(
    **{name: x for name, x in changes.items() if x is not None}
  )
  if options.solver != made.parts.options.solver:
    options = options._replace(solver_options={})
  return options


def _make(made, c, request, noise, path: pathlib.Path, clock) -> None:
  """Samples and writes one video and what belongs to it."""
  budget = None if _BUDGET.value is None else _BUDGET.value * 2**30
  bar = tqdm.tqdm(total=c.steps, unit="step", disable=None, leave=False)

  def phase(name):
    if name == "compile":
      bar.write("compiling, if these shapes are new", end="\n")
    return clock.phase(name)

  with bar:
    result = made.generate(
      request.prompt,
      negative_prompt=_negative(made, c, request),
      image=_requests.read_image(request.image),
      last_image=_requests.read_image(request.last_image),
      height=c.height,
      width=c.width,
      frames=c.frames,
      steps=c.steps,
      guidance_scale=float(c.guidance_scale),
      shift=c.shift,
      options=_options(made, c),
      seed=request.seed,
      noise=noise,
      size_rule=c.size_rule,
      one_program=_ONE_PROGRAM.value,
      memory_budget=budget,
      phase=phase,
      on_step=lambda i, x: bar.update(),
    )
  settings = {
    "model": _MODEL.value or c.model,
    "image": request.image,
    "last_image": request.last_image,
    "lora": _LORA.value,
    "noise": _NOISE.value,
    **result.settings,
  }
  with tempfile.TemporaryDirectory(prefix=".new.", dir=path.parent) as new:
    new = pathlib.Path(new)
    shown = _write_video(new / "video.mp4", result, settings, clock)
    with clock.phase("write"):
      title = f"{request.prompt[:90]}  (seed {request.seed})"
      _sheet.write_frames(new / "sheet.png", title, shown)
    seconds = clock.report()
    report = {
      "settings": settings,
      "seconds": seconds,
      "memory": {
        "peak_rss_bytes": memory.peak_rss(),
        "peak_device_bytes": memory.peak_device(),
      },
      "versions": _report.versions(),
    }
    with files.atomic(new / "report.json") as file:
      file.write_text(_report.to_json(report), encoding="utf-8")
    for name, suffix in (
      ("sheet.png", ".png"),
      ("report.json", ".json"),
      ("video.mp4", ".mp4"),
    ):
      (new / name).replace(path.with_name(path.name + suffix))
  phases = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total")
  print(f"{path}.mp4: {seconds['total']:.1f} s ({phases})", flush=True)


def _write_video(path, result, settings, clock):
  """Writes the mp4 chunk by chunk; returns (title, frame)s for the sheet."""
  frames = result.size.frames
  wanted = set(np.linspace(0, frames - 1, _SHEET_FRAMES).round().astype(int))
  shown, count = [], 0
  with (
    video_files.VideoWriter(
      path,
      fps=generation.FPS,
      crf=_CRF.value,
      comment=json.dumps(settings, ensure_ascii=False),
    ) as writer,
    tqdm.tqdm(total=frames, unit="frame", disable=None, leave=False) as bar,
  ):
    for chunk in result.chunks(0):
      with clock.phase("write"):
        writer.write(chunk[0])
      shown += [
        (f"frame {count + i}", frame)
        for i, frame in enumerate(chunk[0])
        if count + i in wanted
      ]
      count += chunk.shape[1]
      bar.update(chunk.shape[1])
  return shown


if __name__ == "__main__":
  _program.run(main, config=f"{_CONFIGS / 'sample.py'}:tiny")
