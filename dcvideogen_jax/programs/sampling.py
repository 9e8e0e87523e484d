"""Flags, loading and the loop over requests of `sample` and `stream`."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax import errors
from dcvideogen_jax.programs import common, distributed
from dcvideogen_jax.sample import presets

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  f"A preset, one of {', '.join(presets.MODELS)}, optionally with a size, one"
  f" of {', '.join(presets.SIZES)}, as in dc-t2v-14b,size=720p; or a config"
  " file and, after a colon, its argument. Unset: tiny. --config.KEY=VALUE"
  " overrides a value: steps, guidance_scale, shift, solver, height, width,"
  " mesh.context, or any other in sample/presets.py.",
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Model to sample from: tiny, which ships, a directory in a published layout,"
  " or a Hugging Face repository owner/name@revision. Unset: the model of"
  " --config.",
)
_TASK = flags.DEFINE_enum(
  "task",
  None,
  ["t2v", "i2v"],
  "t2v is text to video, i2v image to video. Unset: i2v if the first prompt has"
  " an image, else the task of --config.",
)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder",
  None,
  "Weights of DC-AE-V. Unset: those in the model's directory.",
)
_DECODER = flags.DEFINE_string("decoder", None, common.DECODER_HELP)
_IMAGE_ENCODER = flags.DEFINE_string(
  "image_encoder",
  None,
  "Weights of CLIP. Unset: those in the model's directory.",
)
_LORA = flags.DEFINE_multi_string(
  "lora",
  [],
  "LoRA or other adapter to merge into the transformer: PATH, PATH,SCALE or"
  " PATH,SCALE,skip=PATTERN, with a scale of 1 unless given. Tensors with names"
  " that contain the regular expression PATTERN are left out; skip=interface"
  " leaves out the patch embedding and the head. Several files add up",
)
_FEW = flags.DEFINE_bool(
  "few",
  False,
  "Make videos in a few evaluations: with the few-step LoRA that --lora names,"
  " a directory with a few.json, or else with the one that the model brings."
  " For other LoRAs: --lora and --config.few=NAME",
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "Text that describes a video; each prompt gets its own video"
)
_PROMPTS = flags.DEFINE_string(
  "prompts",
  None,
  "File of prompts: a .txt file with a prompt per line, or a .jsonl, .json,"
  " .csv or .tsv table with prompt and optionally negative_prompt, image,"
  " last_image and seed.",
)
_IMAGE = flags.DEFINE_string(
  "image", None, "Image file with the first frame, for image to video."
)
_FRAMES = flags.DEFINE_integer(
  "frames",
  None,
  "Number of frames of the video. Unset: that of --config.",
)
_SEEDS = flags.DEFINE_list(
  "seeds",
  ["0"],
  "Seeds of the initial noise, separated by commas. A video is made for each"
  " prompt and seed. A row of --prompts that has a seed uses its own only.",
)
_TEXT_ENCODER = flags.DEFINE_enum(
  "text_encoder",
  "device",
  ["device", "once", "host"],
  "Where the text encoder is. device keeps it there. once embeds all prompts"
  " first, and frees it before the other models are loaded; `sample` also"
  " encodes all images first, and frees CLIP and the encoder of DC-AE-V. host"
  " keeps the text encoder in the host's memory and computes on its CPU.",
)
_BUDGET = flags.DEFINE_float(
  "memory_budget_gib",
  None,
  "Memory for encoding and decoding with DC-AE-V, beyond the weights, in GiB."
  " Unset: 85 % of the free memory.",
  lower_bound=1e-6,
)
_CRF = flags.DEFINE_integer(
  "crf",
  18,
  "Constant rate factor of the mp4 files, from 0 (best quality, largest files)"
  " to 51.",
  lower_bound=0,
  upper_bound=51,
)


def requests(seeds: Sequence[str], last_image: str | None = None) -> list[Any]:
  """Returns the `request_list.Request`s of the flags.

  Args:
    seeds: of --seeds.
    last_image: file of the last frame, for all that name none.

  Raises:
    errors.UserError: as `request_list.gather`.
  """
  from dcvideogen_jax.sample import request_list

  return request_list.gather(
    _PROMPT.value, _PROMPTS.value, seeds, _IMAGE.value, last_image
  )


def task(c: Any) -> str:
  """Returns --task, or else that of the config."""
  return _TASK.value or c.task


class Job:
  """The videos that the flags ask for; checked, but nothing is loaded yet.

  Attributes:
    c: the config.
    requests: a `request_list.Request` for each video that is left to make.
    listed: those of all videos.
    clock: a running `clock.Clock`.
    few: the `few_steps.Choice` of the flags, or None.
  """

  def __init__(
    self,
    last_image: str | None = None,
    needs_image: bool = True,
    export: Callable[..., Any] | None = None,
    stream: bool = False,
  ):
    """Joins the other processes and reads the flags.

    Args:
      last_image: file of the last frame, for all requests that name none.
      needs_image: whether image to video needs an image.
      export: makes an `exporting.Export` of the config and --seeds, whose
        videos are the requests; None reads prompts, images and seeds.
      stream: whether videos are made chunk by chunk.

    Raises:
      errors.UserError: for flags that are sure to fail later.
    """
    if export is None or not distributed.apart():
      distributed.join()
    from dcvideogen_jax import clock
    from dcvideogen_jax.sample import request_list, settings

    self.clock = clock.Clock()
    self.c = CONFIG.value
    if _FRAMES.value is not None:
      self.c.frames = _FRAMES.value
    self._export = None if export is None else export(self.c, _SEEDS.value)
    self.requests = (
      requests(_SEEDS.value, last_image)
      if self._export is None
      else self._export.videos
    )
    self.listed = [*self.requests]
    self._task = _TASK.value or (
      "i2v" if self.requests[0].image else self.c.task
    )
    self.few = self._few_steps(stream)
    settings.check(self.c)
    request_list.check(self.requests, self._task, needs_image)

  def _few_steps(self, stream: bool) -> Any:
    """Settles the config for few steps; returns the choice, or None."""
    from dcvideogen_jax.sample import few_steps, model_names

    if _FEW.value and self.c.few is not None:
      raise errors.UserError(
        "--few is the model's own: expected no --config.few, found"
        f" {self.c.few}"
      )
    if _FEW.value:
      paths = [model_names.lora(text).path for text in _LORA.value]
      choice = few_steps.given(paths, stream)
      if choice is None:
        source = model_names.pipeline(_MODEL.value or self.c.model)
        choice = few_steps.own(source, self._task, stream)
    elif self.c.few is not None:
      choice = few_steps.preset(self.c.few)
    else:
      return None
    given = config_flags.get_override_values(flags.FLAGS["config"])
    few_steps.settle(self.c, choice, given)
    print(choice.told(), flush=True)
    if not choice.lora and not _LORA.value:
      print("no --lora: the model itself must be distilled", flush=True)
    return choice

  def run(
    self,
    make: Callable[..., Any],
    output: str,
    *,
    texts: Callable[[str], Iterable[str]],
    told: dict[str, Any],
    stoppable: bool = False,
    whole: bool = False,
  ) -> None:
    """Loads the model, then makes and writes a video for each request.

    Args:
      make: called with a pipeline, a request and a dictionary of keyword
        arguments for the pipeline; returns the result to write.
      output: the folder of the videos.
      texts: maps a prompt to all texts that are encoded for it.
      told: settings to add to each video's report.
      stoppable: whether Ctrl-C ends a video after the current chunk.
      whole: whether videos are made as a whole, so that all of their images can
        be encoded beforehand.
    """
    from dcvideogen_jax.sample import model_names

    loras = [model_names.lora(text) for text in _LORA.value]
    if self.few and self.few.lora:
      loras.append(model_names.LoraFile(str(self.few.lora)))
    with common.output_directory(output) as folder:
      if self._export is not None:
        self.requests = self._export.remaining(folder, self.made_with())
        if not self.requests:
          return
      embedder = conditions = None
      if _TEXT_ENCODER.value == "once":
        with self.clock.phase("text"):
          embedder = self._embed_all(texts)
        if whole and self._task == "i2v":
          with self.clock.phase("condition"):
            conditions = self._encode_all()
      with self.clock.phase("load"):
        pipeline = self._load(loras, embedder, conditions)
      for index in range(len(self.requests)):
        self._make_one(index, pipeline, folder, make, told, stoppable)
        self.clock.restart("load")

  def _make_one(self, index, pipeline, output, make, told, stoppable) -> None:
    """Makes and writes the video of a request; see `run`."""
    from dcvideogen_jax.sample import (
      results,
      settings,
      vbench,
      vbench_resume,
    )

    request, count = self.requests[index], len(self.requests)
    export = self._export
    title = request.prompt if export is None else request.name(index)
    print(f"{index + 1} of {count}: {title}", flush=True)
    options = settings.of_request(pipeline, self.c, request)
    options |= {"memory_budget": _budget()}
    result = make(pipeline, request, options)
    told = self._told(request) | told
    if export is not None:
      told |= {export.key: vbench_resume.told(request, self.made_with())}
    with results.interruptible(stoppable) as interrupted:
      results.write(
        output / request.name(index),
        request,
        result,
        self.clock,
        settings=told,
        crf=_CRF.value,
        interrupted=interrupted,
        folders=results.BESIDE if export is None else vbench.FOLDERS,
      )
      # Ctrl-C came during the last chunk, so the video is complete.
      if interrupted() and index + 1 < count:
        raise KeyboardInterrupt

  def made_with(self) -> dict[str, Any]:
    """Returns what a video of the export depends on, but for its prompt."""
    given = (_AUTOENCODER, _DECODER, _IMAGE_ENCODER, _LORA, _CRF)
    return self._export.made_with(
      self._task,
      {
        "model": _MODEL.value or self.c.model,
        **{flag.name: flag.value for flag in given},
        "few": self.few and self.few.told(),
      },
    )

  def _embed_all(self, texts: Any) -> Any:
    """Loads the text encoder, embeds all texts and frees it."""
    from dcvideogen_jax.sample import embedding, loading, settings

    options = self._options()
    print(f"loading the text encoder of {options['source']}", flush=True)
    found = loading.texts(**options)
    embedder = embedding.Embedder(found, options["layout"])
    default = embedding.negative_prompt(self._task)
    for request in self.requests:
      negative = settings.negative_prompt(default, self.c, request)
      for text in (*texts(request.prompt), negative):
        embedder(text)
    embedder.free()
    return embedder

  def _encode_all(self) -> Any:
    """Loads the image encoders, encodes all images and frees the encoders."""
    from dcvideogen_jax.sample import loading, request_list, settings
    from dcvideogen_jax.sample import pipeline as pipeline_lib

    options = self._options()
    print(f"loading the image encoders of {options['source']}", flush=True)
    parts = loading.image_encoders(**options)
    encoders = pipeline_lib.DCVideoGen(parts, options["layout"])
    conditions = encoders.encode_images(
      settings.of_request(encoders, self.c, request)
      | {
        "last_image": request_list.read_image(request.last_image),
        "size_rule": self.c.size_rule,
        "condition_tail": self.c.condition_tail,
        "memory_budget": _budget(),
      }
      for request in self.requests
    )
    loading.free(parts)
    return conditions

  def _load(self, loras: Sequence[Any], embedder: Any, conditions: Any) -> Any:
    from dcvideogen_jax.sample import loading, model_names
    from dcvideogen_jax.sample import pipeline as pipeline_lib

    change = functools.partial(model_names.with_loras, loras=loras)

    options = self._options()
    print(f"loading {options['source']} for {self._task}", flush=True)
    where = _TEXT_ENCODER.value
    parts = loading.load(
      **options,
      text_encoder=None if where == "once" else where,
      image_encoders=conditions is None,
      change=change if loras else None,
    )
    module = parts.transformer.module.clone(attention=self.c.attention)
    parts = parts._replace(
      transformer=parts.transformer._replace(module=module)
    )
    return pipeline_lib.DCVideoGen(
      parts, options["layout"], embedder, conditions
    )

  def _options(self) -> dict[str, Any]:
    """Returns the arguments that `loading.load` and `loading.texts` share."""
    from dcvideogen_jax.sample import model_names, placement, settings

    return {
      "source": model_names.pipeline(_MODEL.value or self.c.model),
      "task": self._task,
      "autoencoder": _AUTOENCODER.value,
      "image_encoder": _IMAGE_ENCODER.value,
      "decoder": _DECODER.value,
      "dtype": settings.DTYPES[self.c.dtype],
      "layout": placement.layout(self.c.mesh, self.c.sharding),
      "weights": self.c.weights,
    }

  def _told(self, request: Any) -> dict[str, Any]:
    given = (_AUTOENCODER, _DECODER, _IMAGE_ENCODER, _LORA, _CRF, _BUDGET)
    return {
      "model": _MODEL.value or self.c.model,
      **{flag.name: flag.value for flag in given},
      "few": self.few and self.few.told(),
      "image": request.image,
      "last_image": request.last_image,
    }


def _budget() -> float | None:
  """Returns the bytes that --memory_budget_gib allows; None if it is unset."""
  return _BUDGET.value and _BUDGET.value * 2**30
