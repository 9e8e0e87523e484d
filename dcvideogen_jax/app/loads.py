"""Loads the pipeline that the page makes videos with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from dcvideogen_jax.sample import (
  few_steps,
  loading,
  model_names,
  pipeline,
  placement,
  presets,
  settings,
)


class Models:
  """Loads pipelines as `dcvideogen sample` does, and holds one.

  The few-step LoRA is merged into the transformer when it is asked for. The
  transformer without it is read again when that one is asked for: two are never
  in memory. Other models, embedded texts and compiled programs stay meanwhile.

  Attributes:
    held: the pipeline; None at first, while another one comes, and if that
      failed.
  """

  def __init__(
    self,
    config: str,
    *,
    model: str | None = None,
    autoencoder: str | None = None,
    image_encoder: str | None = None,
    loras: Sequence[str] = (),
    text_encoder: str = "device",
    weights: str | None = None,
  ):
    """Loads nothing yet.

    Args:
      config: name of a preset.
      model: replaces that of the preset.
      autoencoder, text_encoder, weights: as for `loading.load`.
      image_encoder: as for `loading.load`; text to video has none.
      loras: as `model_names.lora` parses them.

    Raises:
      errors.UserError: if there is no such preset, model or LoRA.
    """
    c = presets.get_config(config)
    self.held: pipeline.DCVideoGen | None = None
    self._few = False
    self._name = model or c.model
    self._loras = [model_names.lora(text) for text in loras]
    self._layout = placement.layout(c.mesh, c.sharding)
    self._text_encoder, self._image_encoder = text_encoder, image_encoder
    self._options: dict[str, Any] = {
      "source": model_names.pipeline(self._name),
      "autoencoder": autoencoder,
      "dtype": settings.DTYPES[c.dtype],
      "layout": self._layout,
      "weights": weights,
    }

  def get(
    self,
    task: str,
    few: bool = False,
    tell: Callable[[str], Any] | None = None,
  ) -> pipeline.DCVideoGen:
    """Returns the pipeline of a task; the one before it goes.

    Args:
      task: "t2v" or "i2v".
      few: whether the model's few-step LoRA is merged into the transformer,
        if none of `loras` is one.
      tell: called with a line about what is loaded, before it is.

    Raises:
      errors.UserError: if the model has no transformer or no few-step LoRA for
        the task.
    """
    few = few and not few_steps.given([lora.path for lora in self._loras])
    held = self.held
    if held is not None and (held.task, self._few) == (task, few):
      return held
    merged = self._merged(task, few)
    if held is not None and held.task != task:
      held = None  # Both might not fit.
    in_place = held is not None and few and self._can_merge()
    what = self._name if held is None else f"the transformer of {self._name}"
    text = f"loading {what} for {task}"
    if few:
      text += ", with its few-step LoRA"
    if in_place:
      text = f"merging the few-step LoRA of {self._name} into its transformer"
    print(text, flush=True)
    if tell is not None:
      tell(text)
    self.held = None  # What follows may fail half-way.
    if held is None:
      where = self._text_encoder
      parts = loading.load(**self._of(task), text_encoder=where, change=merged)
      held = pipeline.DCVideoGen(parts, self._layout)
    elif in_place:
      transformer = merged(held.parts.transformer)
      held.parts = held.parts._replace(transformer=transformer)
    else:
      self._read_transformer(held, merged)
    self.held, self._few = held, few
    return held

  def _can_merge(self) -> bool:
    """Whether merging into the weights as they are gives those of `loading`.

    LoRAs are added up before the sum is rounded to the weights' dtype, and
    weights are rounded to eight bits at last.
    """
    plain = self._options["weights"] in (None, "bfloat16")
    return plain and not self._loras

  def _read_transformer(self, held: pipeline.DCVideoGen, merged: Any) -> None:
    """Replaces a pipeline's transformer, which is freed first."""
    without = held.parts.transformer._replace(variables={})
    held.parts = held.parts._replace(transformer=without)
    transformer = loading.transformer(**self._of(held.task), change=merged)
    held.parts = held.parts._replace(transformer=transformer)

  def _of(self, task: str) -> dict[str, Any]:
    """Returns what `loading.load` and `loading.transformer` share."""
    images = self._image_encoder if task == "i2v" else None
    return self._options | {"task": task, "image_encoder": images}

  def _merged(self, task: str, few: bool) -> Any:
    """Returns a function that merges all LoRAs; None if there are none."""
    loras = [*self._loras]
    if few:
      choice = few_steps.own(self._options["source"], task)
      loras.append(model_names.LoraFile(str(choice.lora)))
    if not loras:
      return None
    return functools.partial(model_names.with_loras, loras=loras)
