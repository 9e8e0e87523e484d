"""Makes videos from prompts, and from images.

  python -m launch.sample --model=tiny --prompt="a red ball rolls" --output=out
  python -m launch.sample --config=configs/sample.py:dc-i2v-14b,size=720p \\
    --prompt="..." --image=photo.jpg --seeds=0,1 --output=out
  python -m launch.sample --config=configs/sample.py:dc-t2v-14b,size=1080p \\
    --config.mesh.context=4 --config.mesh.data=2 --prompt="..." --output=out

A block-causal transformer goes on for as long as is asked for, in memory that
a window bounds; the mp4 grows with the video.

  python -m launch.sample --model=DIR --stream --frames=1600 --window=2 \\
    --sink=1 --prompt="..." --prompt_at="3:..." --output=out

The mesh says how several devices share a video: "data" has the two passes of
the guidance (or prompts), "context" the tokens, "tensor" the heads and hidden
features with their weights, "spatial" the columns of the picture in decoding.

Writes per prompt and seed `{index}_{prompt}_seed{seed}`
  .mp4    with its settings in the comment tag
  .png    a contact sheet
  .json   settings, versions, seconds per phase, memory; of each chunk of frames
          when it was there and how much memory had been needed
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import convert, errors, files, memory, provenance
from dcvideogen_jax.data import tables, tokenize
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.eval import contact_sheet
from dcvideogen_jax.ops import attention
from dcvideogen_jax.programs import common, distributed, stream_flags
from dcvideogen_jax.sample import (
  arguments,
  generation,
  loading,
  model_names,
  pipeline,
  placement,
  request_list,
  sizes,
  streams,
  weights_cache,
)

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
  "A .txt file with a prompt per line, or a table, .jsonl, .json, .csv or .tsv,"
  " with prompt and maybe negative_prompt, image, last_image, seed.",
)
_IMAGE = flags.DEFINE_string("image", None, "The first frame.")
_LAST_IMAGE = flags.DEFINE_string("last_image", None, "The last frame.")
_FRAMES = flags.DEFINE_integer(
  "frames", None, "Of the video. Unset: as the config has it."
)
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
  "For encoding and decoding with DC-AE-V, beyond the weights. Unset: most"
  " of what is free.",
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

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DEFAULT_CONFIG = f"{_CONFIGS / 'sample.py'}:tiny"
_SHEET_FRAMES = 8
_DTYPES = {None: None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def main(argv: Sequence[str]) -> None:
  """Checks, loads, samples, writes."""
  del argv
  distributed.join()
  clock = clock_lib.Clock()
  c = _CONFIG.value
  if _FRAMES.value is not None:
    c.frames = _FRAMES.value
  requests = request_list.gather(
    _PROMPT.value, _PROMPTS.value, _SEEDS.value, _IMAGE.value, _LAST_IMAGE.value
  )
  task = _TASK.value or ("i2v" if requests[0].image else c.task)
  _check(c, requests, task)
  noise = _read_noise(_NOISE.value)
  loras = [model_names.lora(text) for text in _LORA.value]
  with common.output_directory(_OUTPUT.value) as output:
    with clock.phase("load"):
      made = _load(c, task, loras)
    if _FREE_TEXT_ENCODER.value:
      with clock.phase("text"):
        _read_texts(made, c, requests)
      made.free_text_encoder()
    for index, request in enumerate(requests):
      print(f"{index + 1} of {len(requests)}: {request.prompt}", flush=True)
      result = _sample(made, c, request, noise, clock)
      _write(output / request.name(index), request, result, clock)
      clock.restart("load")


def _check(c: Any, requests: list[request_list.Request], task: str) -> None:
  """Refuses, before anything is loaded, what is sure to fail later.

  Raises:
    errors.UserError: says what is wrong.
  """
  if c.height is not None or c.width is not None:
    sizes.checked(c.frames, c.height, c.width)
  else:
    sizes.checked(c.frames, c.area, 1)
  if c.size_rule not in sizes.RULES:
    raise errors.UserError(
      f"config.size_rule must be {' or '.join(sizes.RULES)}, found "
      f"{c.size_rule!r}"
    )
  arguments.condition_tail(c.condition_tail, c.size_rule)
  if c.attention is not None:
    attention.require(c.attention)
  if c.dtype not in _DTYPES:
    raise errors.UserError(
      f"config.dtype must be float32 or bfloat16, found {c.dtype!r}"
    )
  options = _options(loading.DEFAULT_OPTIONS, c)
  if c.shift is not None:
    options = options._replace(shift=c.shift)
  schedule = options.schedule(arguments.steps(c.steps))
  sampler.plan(schedule, options.solver, **options.solver_options)
  stream_flags.check(
    {
      "last_image": any(request.last_image for request in requests),
      "noise": _NOISE.value,
      "one_program": _ONE_PROGRAM.value,
      "config.size_rule": c.size_rule != "exact",
      "config.condition_tail": c.condition_tail,
    }
  )
  if c.negative_prompt is not None:
    tables.require_text(c.negative_prompt, "config.negative_prompt")
  continues = stream_flags.continues()
  for request in requests:
    if task == "i2v" and request.image is None and not continues:
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
    found = np.load(path, allow_pickle=False)
  except OSError as e:
    raise errors.UserError(
      f"cannot read --noise={path}: {e.strerror or e}"
    ) from e
  # NumPy's own message on other files tells how to run their pickles.
  except (ValueError, EOFError) as e:
    raise errors.UserError(
      f"--noise={path} is no .npy file of numbers, or is damaged"
    ) from e
  if not isinstance(found, np.ndarray):
    raise errors.UserError(
      f"--noise={path} is an archive, expected a .npy file"
    )
  return found[None]


def _load(
  c: Any, task: str, loras: list[tuple[str, float]]
) -> pipeline.DCVideoGen:
  source = model_names.pipeline(_MODEL.value or c.model)
  layout = placement.layout(c.mesh, c.sharding)
  print(f"loading {source} for {task}", flush=True)
  load = convert.load
  if _WEIGHTS_CACHE.value:
    load = weights_cache.caching(files.cache_directory() / "weights")
  parts = loading.load(
    source,
    task=task,
    autoencoder=_AUTOENCODER.value,
    image_encoder=_IMAGE_ENCODER.value,
    dtype=_DTYPES[c.dtype],
    load_model=load,
    layout=layout,
  )
  if loras:
    parts = parts._replace(transformer=_merged(*parts.transformer, loras))
  module, variables = parts.transformer
  part = loading.Part(module.clone(attention=c.attention), variables)
  parts = parts._replace(transformer=part)
  return pipeline.DCVideoGen(parts, layout)


def _merged(
  module: Any, variables: Any, loras: list[tuple[str, float]]
) -> loading.Part:
  """The transformer with the sum of all updates, of which it tells."""
  found = []
  for path, scale in loras:
    found.append(convert.load_lora("wan_dit", path, module, scale))
    matched = found[-1].matched
    print(f"{path}: {matched} tensors of LoRA matched", flush=True)
  params = convert.merge(variables["params"], convert.add(found), donate=True)
  return loading.Part(module, {"params": params})


def _read_texts(made, c, requests):
  for request in requests:
    for text in stream_flags.prompts(request.prompt).values():
      made.embed([text])
    made.embed([_negative(made, c, request)])


def _negative(made, c, request):
  text = request.negative_prompt
  text = c.negative_prompt if text is None else text
  if text is None:
    return made.negative_prompt()
  return tokenize.NEGATIVE_PROMPTS.get(text, text)


def _options(options: flow.Options, c: Any) -> flow.Options:
  """The checkpoint's solver and grid, with the config's changes."""
  if c.solver not in (None, options.solver):
    options = options._replace(solver=c.solver, solver_options={})
  return options if c.grid is None else options._replace(grid=c.grid)


def _sample(
  made, c, request, noise, clock
) -> generation.Generation | streams.Stream:
  """Denoises, with a bar whose time left is that of the steps."""
  image, last_image = (
    request_list.read_image(x) for x in (request.image, request.last_image)
  )
  options = {
    "negative_prompt": _negative(made, c, request),
    "image": image,
    "height": c.height,
    "width": c.width,
    "area": c.area,
    "frames": c.frames,
    "steps": c.steps,
    "guidance_scale": c.guidance_scale,
    "batched": c.batched,
    "shift": c.shift,
    "options": _options(made.parts.options, c),
    "seed": request.seed,
    "memory_budget": None if _BUDGET.value is None else _BUDGET.value * 2**30,
  }
  if stream_flags.asked():
    return stream_flags.make(
      made, c, request.prompt, phase=clock.phase, **options
    )
  bar = tqdm.tqdm(total=c.steps, unit="step", disable=None, leave=False)

  def phase(name):
    if name == "compile":
      bar.write("compiling, if these shapes are new")
    if name == "denoise":
      bar.reset()
    return clock.phase(name)

  with bar:
    return made.generate(
      request.prompt,
      last_image=last_image,
      noise=noise,
      size_rule=c.size_rule,
      condition_tail=c.condition_tail,
      one_program=_ONE_PROGRAM.value,
      phase=phase,
      on_step=lambda i, x: bar.update(),
      **options,
    )


def _write(path: pathlib.Path, request, result, clock) -> None:
  """Decodes into the mp4, and writes what belongs to it."""
  settings = {
    "model": _MODEL.value or _CONFIG.value.model,
    **{
      flag.name: flag.value
      for flag in (_AUTOENCODER, _IMAGE_ENCODER, _LORA, _NOISE, _CRF)
    },
    "memory_budget_gib": _BUDGET.value,
    "image": request.image,
    "last_image": request.last_image,
    **stream_flags.settings(),
    "fps": generation.FPS,
    **result.settings,
  }
  with files.atomic_files(path.parent, last=".mp4") as new:
    made = new / f"{path.name}.mp4"
    shown, chunks, stopped = _write_video(made, result, settings, clock)
    with clock.phase("write"):
      title = f"{request.prompt[:90]}  (seed {request.seed})"
      contact_sheet.write_frames(new / f"{path.name}.png", title, shown)
    seconds = clock.report()
    with files.atomic(new / f"{path.name}.json") as file:
      report = {
        "settings": settings,
        "seconds": seconds,
        "chunks": chunks,
        "memory": {
          "peak_rss_bytes": memory.peak_rss(),
          "peak_device_bytes": memory.peak_device(),
        },
        "versions": provenance.versions(),
      }
      file.write_text(provenance.to_json(report), encoding="utf-8")
  if (count := chunks[-1]["frames"]) < result.size.frames:
    print(f"{path}.mp4: {count} of {result.size.frames} frames", flush=True)
    if stopped:
      raise KeyboardInterrupt
    raise RuntimeError("the decoder gave fewer frames than it was to give")
  phases = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total")
  print(f"{path}.mp4: {seconds['total']:.1f} s ({phases})", flush=True)


def _write_video(path, result, settings, clock):
  """Writes the mp4 chunk by chunk.

  Returns:
    (title, frame)s for the sheet; of each chunk the number of frames so far,
    the seconds since the first was asked for, and the most memory so far;
    whether the user has stopped it.
  """
  frames = result.size.frames
  wanted = set(np.linspace(0, frames - 1, _SHEET_FRAMES).round().astype(int))
  shown, chunks, count, since = [], [], 0, time.perf_counter()
  stopped = False
  with (
    video_files.VideoWriter(
      path,
      fps=generation.FPS,
      crf=_CRF.value,
      comment=json.dumps(settings, ensure_ascii=False),
    ) as writer,
    tqdm.tqdm(total=frames, unit="frame", disable=None, leave=False) as bar,
    stream_flags.interruptible() as interrupted,
  ):
    for chunk in result.chunks(0):
      with clock.phase("write"):
        writer.write(chunk[0])
      shown += [
        # A copy, as a view would keep the chunk.
        (f"frame {count + i}", frame.copy())
        for i, frame in enumerate(chunk[0])
        if count + i in wanted
      ]
      count += chunk.shape[1]
      bar.update(chunk.shape[1])
      chunks.append(clock_lib.arrival(count, since))
      if stopped := interrupted():
        break
  return shown, chunks, stopped
