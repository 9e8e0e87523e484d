"""Loads the parts of a pipeline from published files."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert, errors
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.sample import latents, layouts

# What a checkpoint without a scheduler means.
DEFAULT_SCHEDULER = {
  "_class_name": "UniPCMultistepScheduler",
  "solver_order": 2,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
  "flow_shift": 5.0,
}


class Part(NamedTuple):
  """A model and its variables."""

  module: Any
  variables: Mapping[str, Any]


class Texts(NamedTuple):
  """A tokenizer and an encoder, or nothing where embeddings are given."""

  tokenizer: tokenize.Tokenizer
  encoder: Part


class Parts(NamedTuple):
  """All that a pipeline is made of; see `pipeline.DCVideoGen`."""

  transformer: Part
  space: latents.Deep | latents.Wan
  texts: Texts | None = None
  image_encoder: Part | None = None
  options: flow.Options = flow.from_config(DEFAULT_SCHEDULER)
  dtype: Any = jnp.float32

  @property
  def task(self) -> str:
    """What the transformer is for, "t2v" or "i2v"."""
    return "t2v" if self.transformer.module.image_width is None else "i2v"


def load(
  source: str | os.PathLike[str],
  *,
  task: str = "t2v",
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  load_model: Callable[..., tuple[Any, Any]] = convert.load,
) -> Parts:
  """Loads a published model, straight from its PyTorch files.

  Args:
    source: a directory in one of the layouts of `sample.layouts`, or a Hugging
      Face repository "owner/name@revision".
    task: "t2v" or "i2v", where a directory holds both.
    autoencoder: where DC-AE-V is, if not there.
    image_encoder: where CLIP is, if not there.
    dtype: of networks and weights; None is bfloat16, on a CPU float32, which is
      faster there. CLIP and Wan's autoencoder stay in float32.
    load_model: replaces `convert.load`, for example by one that caches.

  Raises:
    errors.UserError: if a part is missing, damaged or does not fit.
  """
  if task not in layouts.TASKS:
    raise errors.UserError(
      f"task must be one of {', '.join(layouts.TASKS)}, found {task!r}"
    )
  if dtype is None:
    half = jax.default_backend() != "cpu"
    dtype = jnp.bfloat16 if half else jnp.float32
  directory = pathlib.Path(source)
  if layouts.is_repository(source):
    directory = layouts.download(os.fspath(source), task)
  paths = layouts.find(directory, task)
  given = {"dc_ae_v": autoencoder, "image_encoder": image_encoder}
  paths = paths._replace(
    **{k: pathlib.Path(v) for k, v in given.items() if v is not None}
  )
  needed = ["transformer", "text_encoder", "tokenizer"]
  space = "wan_vae" if paths.dc_ae_v is None and paths.wan_vae else "dc_ae_v"
  clip = ["image_encoder"] if task == "i2v" else []
  layouts.require(paths, [*needed, space, *clip], source)

  options = _read_scheduler(paths.scheduler)
  texts = _load_texts(paths, dtype, load_model)
  transformer = Part(*load_model("wan_dit", paths.transformer, dtype=dtype))
  if space == "dc_ae_v":
    made = latents.Deep(*load_model(space, paths.dc_ae_v, dtype=dtype))
  else:
    made = latents.Wan(*load_model(space, paths.wan_vae, dtype=jnp.float32))
  if clip:
    clip = load_model("clip_vision", paths.image_encoder, dtype=jnp.float32)
  parts = Parts(
    transformer, made, texts, Part(*clip) if clip else None, options, dtype
  )
  if parts.task != task:
    raise errors.UserError(
      f"the transformer in {paths.transformer} is for {parts.task}, not {task}"
    )
  return parts


def _load_texts(paths, dtype, load_model):
  tokenizer = tokenize.Tokenizer.from_directory(paths.tokenizer)
  encoder = Part(*load_model("umt5", paths.text_encoder, dtype=dtype))
  if tokenizer.vocab > encoder.module.vocab:
    raise errors.UserError(
      f"{paths.tokenizer} has {tokenizer.vocab} tokens, more than the "
      f"{encoder.module.vocab} of {paths.text_encoder}"
    )
  return Texts(tokenizer, encoder)


def _read_scheduler(path: pathlib.Path | None) -> flow.Options:
  if path is None:
    return flow.from_config(DEFAULT_SCHEDULER)
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"cannot read {path}: {e}") from e
  return flow.from_config(config)
