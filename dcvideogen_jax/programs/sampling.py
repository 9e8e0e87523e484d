"""What `sample` and `stream` share: flags, loading, a video per request."""

from typing import Any

from absl import flags
from ml_collections import config_flags

from dcvideogen_jax.programs import common, distributed
from dcvideogen_jax.sample import presets

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  f"A preset, one of {', '.join(presets.MODELS)}, and maybe its size, one of"
  f" {', '.join(presets.SIZES)}: dc-t2v-14b,size=720p. Or a config file and,"
  " after a colon, its argument. Unset: tiny. --config.KEY=VALUE overrides one"
  " of steps, guidance_scale, shift, solver, height, width, mesh.context and"
  " what else sample/presets.py has.",
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  '"tiny", a directory as published, or a Hugging Face repository'
  ' "owner/name@revision". Unset: the config\'s.',
)
_TASK = flags.DEFINE_enum(
  "task",
  None,
  ["t2v", "i2v"],
  "Text or image to video. Unset: i2v if there is an --image, else the"
  " config's.",
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
_FRAMES = flags.DEFINE_integer(
  "frames", None, "Length of the video. Unset: the config's."
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "A video is made for each.")
_OUTPUT = flags.DEFINE_string("output", None, "A directory.", required=True)
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


class Job:
  """What is asked for: everything is checked, nothing loaded.

  Attributes:
    c: the config.
    requests: one for each video.
    clock: started.
  """

  def __init__(self, last_image: str | None = None, needs_image: bool = True):
    """Joins the other processes and reads the flags.

    Args:
      last_image: of all requests that have none of their own.
      needs_image: whether image to video needs one.

    Raises:
      errors.UserError: for what is sure to fail later.
    """
    distributed.join()
    from dcvideogen_jax import clock
    from dcvideogen_jax.sample import request_list, settings

    self.clock = clock.Clock()
    self.c = CONFIG.value
    if _FRAMES.value is not None:
      self.c.frames = _FRAMES.value
    self.requests = request_list.gather(
      _PROMPT.value, _PROMPTS.value, _SEEDS.value, _IMAGE.value, last_image
    )
    self._task = _TASK.value or (
      "i2v" if self.requests[0].image else self.c.task
    )
    settings.check(self.c)
    request_list.check(self.requests, self._task, needs_image)

  def run(self, make, *, texts, told, stoppable=False) -> None:
    """Loads the model, then makes and writes a video for each request.

    Args:
      make: from a pipeline, a request and arguments to a result.
      texts: from a prompt to all that are read for it.
      told: what the reports say besides.
      stoppable: whether Ctrl-C ends a video after the chunk being made.
    """
    from dcvideogen_jax.sample import model_names, results, settings

    loras = [model_names.lora(text) for text in _LORA.value]
    budget = _BUDGET.value and _BUDGET.value * 2**30
    with common.output_directory(_OUTPUT.value) as output:
      with self.clock.phase("load"):
        pipeline = self._load(loras)
      if _FREE_TEXT_ENCODER.value:
        with self.clock.phase("text"):
          for request in self.requests:
            negative = settings.negative_prompt(pipeline, self.c, request)
            for text in (*texts(request.prompt), negative):
              pipeline.embed([text])
        pipeline.free_text_encoder()
      for index, request in enumerate(self.requests):
        count = len(self.requests)
        print(f"{index + 1} of {count}: {request.prompt}", flush=True)
        options = settings.of_request(pipeline, self.c, request)
        result = make(pipeline, request, options | {"memory_budget": budget})
        with results.interruptible(stoppable) as interrupted:
          results.write(
            output / request.name(index),
            request,
            result,
            self.clock,
            settings=self._told(request) | told,
            crf=_CRF.value,
            interrupted=interrupted,
          )
        self.clock.restart("load")

  def _load(self, loras: list[tuple[str, float]]) -> Any:
    from dcvideogen_jax.sample import loading, model_names, placement, settings
    from dcvideogen_jax.sample import pipeline as pipeline_lib

    source = model_names.pipeline(_MODEL.value or self.c.model)
    layout = placement.layout(self.c.mesh, self.c.sharding)
    print(f"loading {source} for {self._task}", flush=True)
    parts = loading.load(
      source,
      task=self._task,
      autoencoder=_AUTOENCODER.value,
      image_encoder=_IMAGE_ENCODER.value,
      dtype=settings.DTYPES[self.c.dtype],
      layout=layout,
    )
    module, variables = parts.transformer
    if loras:
      variables = model_names.merge_loras("wan_dit", module, variables, loras)
    module = module.clone(attention=self.c.attention)
    transformer = parts.transformer._replace(module=module, variables=variables)
    parts = parts._replace(transformer=transformer)
    return pipeline_lib.DCVideoGen(parts, layout)

  def _told(self, request: Any) -> dict[str, Any]:
    given = (_AUTOENCODER, _IMAGE_ENCODER, _LORA, _CRF, _BUDGET)
    return {
      "model": _MODEL.value or self.c.model,
      **{flag.name: flag.value for flag in given},
      "image": request.image,
      "last_image": request.last_image,
    }
