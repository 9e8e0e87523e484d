"""Loads the pipeline that the page makes videos with."""

from collections.abc import Sequence

from dcvideogen_jax.sample import (
  loading,
  model_names,
  pipeline,
  placement,
  presets,
  settings,
)


def load(
  config: str,
  task: str,
  *,
  model: str | None = None,
  autoencoder: str | None = None,
  image_encoder: str | None = None,
  loras: Sequence[str] = (),
  text_encoder: str = "device",
  weights: str | None = None,
) -> pipeline.DCVideoGen:
  """Returns a pipeline, as `dcvideogen sample` loads it.

  Args:
    config: name of a preset.
    task: "t2v" or "i2v".
    model: replaces that of the preset.
    autoencoder, text_encoder, weights: as for `loading.load`.
    image_encoder: as for `loading.load`; text to video has none.
    loras: as `model_names.lora` parses them.

  Raises:
    errors.UserError: if there is no such model for the task.
  """
  c = presets.get_config(config)
  parsed = [model_names.lora(text) for text in loras]

  def change(transformer):
    module, variables = transformer
    merged = model_names.merge_loras("wan_dit", module, variables, parsed)
    return transformer._replace(variables=merged)

  source = model_names.pipeline(model or c.model)
  print(f"loading {source} for {task}", flush=True)
  layout = placement.layout(c.mesh, c.sharding)
  parts = loading.load(
    source,
    task=task,
    autoencoder=autoencoder,
    image_encoder=image_encoder if task == "i2v" else None,
    dtype=settings.DTYPES[c.dtype],
    layout=layout,
    weights=weights,
    text_encoder=text_encoder,
    change=change if parsed else None,
  )
  return pipeline.DCVideoGen(parts, layout)
