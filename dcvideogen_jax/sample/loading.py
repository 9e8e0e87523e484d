"""Loads the parts of a pipeline from published files."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert, documents, errors
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.latents import decoder_first, latent_space, spaces
from dcvideogen_jax.sample import decoders, layouts, placement

# Solver, shift and grid for checkpoints without a scheduler: Wan's own.
DEFAULT_OPTIONS = flow.from_config(
  {
    "_class_name": "UniPCMultistepScheduler",
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
  }
)


# Shift without a scheduler for Wan's model of a first and a last image.
_TWO_IMAGES_SHIFT = 16.0


# Names of parts in the rules of `placement.Layout`, by the kind of model.
_NAMES = {
  "wan_dit": "transformer",
  "umt5": "text_encoder",
  "clip_vision": "image_encoder",
  "dc_ae_v": "autoencoder",
  "dc_ae_v_decoder": "autoencoder",
  "wan_vae": "autoencoder",
}


# Where the text encoder may be -> whether that is the host.
_TEXT_ENCODERS = {"device": False, "host": True}


class LoadedModel(NamedTuple):
  """A model and its variables."""

  module: Any
  variables: Mapping[str, Any]

  def with_variables(self, variables: Mapping[str, Any]) -> "LoadedModel":
    """Returns the model with other variables."""
    return self._replace(variables=variables)


class Texts(NamedTuple):
  """A tokenizer and a text encoder.

  Attributes:
    tokenizer: the tokenizer.
    encoder: the text encoder.
    length: tokens of a text that are read.
    on_host: whether the encoder lies in the host's memory and runs there.
  """

  tokenizer: tokenize.Tokenizer
  encoder: LoadedModel
  length: int = tokenize.LENGTH
  on_host: bool = False


class Parts(NamedTuple):
  """All parts of a pipeline; see `pipeline.DCVideoGen`.

  Attributes:
    transformer: the diffusion model.
    space: the latent space, with its autoencoder.
    texts: the text encoder; None if prompts are only given as embeddings.
    image_encoder: CLIP, for image to video; otherwise None.
    options: the checkpoint's solver, shift and grid of noise levels.
    dtype: of the computation.
    files: paths from which the parts were read. The path of a repository's part
      contains the commit.
  """

  transformer: LoadedModel
  space: latent_space.LatentSpace
  texts: Texts | None = None
  image_encoder: LoadedModel | None = None
  options: flow.Options = DEFAULT_OPTIONS
  dtype: Any = jnp.float32
  files: Mapping[str, str] = {}

  @property
  def task(self) -> str:
    """The transformer's task, "t2v" or "i2v"."""
    return _task_of(self.transformer)


def load(
  source: str | os.PathLike[str],
  *,
  task: str = "t2v",
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  load_model: Callable[..., tuple[Any, Any]] = convert.load,
  layout: placement.Layout | None = None,
  weights: str | None = None,
  text_encoder: str | None = "device",
  image_encoders: bool = True,
  change: Callable[[LoadedModel], LoadedModel] | None = None,
  decoder: str | None = None,
) -> Parts:
  """Loads a published model, straight from its PyTorch files.

  For text to video, and without image encoders, only the decoder of DC-AE-V is
  loaded; the encoder follows when a video is encoded, as to continue it.

  Args:
    source: a directory in one of the layouts of `sample.layouts`, or a Hugging
      Face repository "owner/name@revision".
    task: "t2v" or "i2v"; for the latter CLIP is loaded too.
    autoencoder: replaces that of `source`: a file, a directory or a repository;
      see `layouts.locate`.
    image_encoder: CLIP, likewise.
    dtype: of networks and weights. None is bfloat16, but float32 on a CPU,
      where it is faster. CLIP and Wan's autoencoder are always in float32.
    load_model: replaces `convert.load`.
    layout: of the weights on several devices; None is one device.
    weights: the kernels in the blocks of the transformer and of the text
      encoder: "int8", "float8", "bfloat16" for those of `dtype`, or None for
      what the files hold.
    text_encoder: "device"; "host", which also computes on the host's CPU; or
      None for none.
    image_encoders: whether image to video has CLIP and the encoder of DC-AE-V.
    change: changes the transformer, as adapters do, before its kernels are
      rounded to eight bits; they then pass through the host's memory.
    decoder: "fast", a smaller decoder of DC-AE-V in a folder beside it; the
      path of one; or None for DC-AE-V's own. See `sample.decoders`.

  Raises:
    errors.UserError: if a part is missing, damaged or does not fit.
  """
  if task not in layouts.TASKS:
    raise errors.UserError(
      f"task must be one of {', '.join(layouts.TASKS)}, found {task!r}"
    )
  on_host = False
  if text_encoder is not None:
    on_host = errors.choose("text_encoder", text_encoder, _TEXT_ENCODERS)
  paths = decoders.locate(source, task, autoencoder, image_encoder, decoder)
  model = _Models(load_model, _dtype(dtype), layout, check_weights(weights))
  options = _read_scheduler(paths.scheduler)
  tokenizer = tokenize.Tokenizer.from_directory(paths.tokenizer)
  transformer = model.transformer(paths.transformer, change)
  if _task_of(transformer) != task:
    raise errors.UserError(
      f"the transformer in {paths.transformer} is for {_task_of(transformer)}, "
      f"not {task}"
    )
  if paths.scheduler is None and transformer.module.image_positions:
    options = options._replace(shift=_TWO_IMAGES_SHIFT)
  whole = task == "i2v" and image_encoders
  space = model.space(paths, whole)
  check_channels(transformer.module, space)
  found = None
  if text_encoder is not None:
    found = model.texts(paths, tokenizer, on_host)
  clip = None
  if whole and paths.image_encoder is not None:
    clip = model.clip(paths)
  located = paths._asdict().items()
  files = {k: str(v) for k, v in located if isinstance(v, pathlib.Path)}
  return Parts(transformer, space, found, clip, options, model.dtype, files)


def image_encoders(
  source: str | os.PathLike[str],
  *,
  task: str = "i2v",
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  load_model: Callable[..., tuple[Any, Any]] = convert.load,
  layout: placement.Layout | None = None,
  weights: str | None = None,
  decoder: str | None = None,
) -> Parts:
  """Loads CLIP and the autoencoder's encoder alone; arguments as for `load`.

  Returns:
    Parts in which the transformer has no variables, and DC-AE-V only those of
    its encoder.

  Raises:
    errors.UserError: as `load`; also if the model takes no images.
  """
  del weights  # Neither model has them in eight bits.
  paths = decoders.locate(source, task, autoencoder, image_encoder, decoder)
  if paths.image_encoder is None:
    raise errors.UserError("this is a text-to-video model: it takes no image")
  model = _Models(load_model, _dtype(dtype), layout, None)
  transformer = model.of("wan_dit", paths.transformer, only=lambda name: False)
  space = model.encoder(paths)
  check_channels(transformer.module, space)
  return Parts(transformer, space, image_encoder=model.clip(paths))


def free(parts: Parts) -> None:
  """Frees the memory of all models, which cannot be used any more."""
  texts = None if parts.texts is None else parts.texts.encoder
  for model in (parts.transformer, parts.space, texts, parts.image_encoder):
    if model is not None:
      for leaf in jax.tree.leaves(model.variables):
        leaf.delete()


def texts(
  source: str | os.PathLike[str],
  *,
  task: str = "t2v",
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  load_model: Callable[..., tuple[Any, Any]] = convert.load,
  layout: placement.Layout | None = None,
  weights: str | None = None,
  text_encoder: str = "device",
  decoder: str | None = None,
) -> Texts:
  """Loads the tokenizer and the text encoder alone; arguments as for `load`."""
  paths = decoders.locate(source, task, autoencoder, image_encoder, decoder)
  model = _Models(load_model, _dtype(dtype), layout, check_weights(weights))
  tokenizer = tokenize.Tokenizer.from_directory(paths.tokenizer)
  on_host = errors.choose("text_encoder", text_encoder, _TEXT_ENCODERS)
  return model.texts(paths, tokenizer, on_host)


def transformer(
  source: str | os.PathLike[str],
  *,
  task: str = "t2v",
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  load_model: Callable[..., tuple[Any, Any]] = convert.load,
  layout: placement.Layout | None = None,
  weights: str | None = None,
  change: Callable[[LoadedModel], LoadedModel] | None = None,
) -> LoadedModel:
  """Loads the transformer alone; arguments as for `load`."""
  paths = layouts.locate(
    source, task, autoencoder=autoencoder, image_encoder=image_encoder
  )
  model = _Models(load_model, _dtype(dtype), layout, check_weights(weights))
  return model.transformer(paths.transformer, change)


def check_weights(weights: str | None) -> str | None:
  """Returns `weights`.

  Raises:
    errors.UserError: unless it is one of `convert.WEIGHTS`, or None.
  """
  if weights not in (None, *convert.WEIGHTS):
    raise errors.UserError(
      f"config.weights must be one of {', '.join(convert.WEIGHTS)}, found "
      f"{weights!r}"
    )
  return weights


def _dtype(dtype: Any) -> Any:
  if dtype is not None:
    return dtype
  return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


class _Models(NamedTuple):
  """Loads models; the fields are arguments of `load`."""

  load: Callable[..., tuple[Any, Any]]
  dtype: Any
  layout: placement.Layout | None
  weights: str | None

  def of(self, kind: str, path: Any, dtype: Any = None, **options: Any):
    if "sharding" not in options and self.layout is not None:
      options["sharding"] = self.sharding(kind)
    dtype = dtype or self.dtype
    return LoadedModel(*self.load(kind, path, dtype=dtype, **options))

  def sharding(self, kind: str) -> Any:
    if self.layout is None:
      return None
    return functools.partial(self.layout.shardings, _NAMES[kind])

  def in_blocks(self) -> dict[str, str]:
    return {} if self.weights is None else {"weights": self.weights}

  def transformer(self, path: Any, change: Any) -> LoadedModel:
    eight = self.weights not in (None, "bfloat16")
    if not (change and eight):
      found = self.of("wan_dit", path, **self.in_blocks())
      return change(found) if change else found
    found = change(self.of("wan_dit", path, sharding=convert.host()))
    where = self.sharding("wan_dit")
    return LoadedModel(
      *convert.in_eight_bits("wan_dit", *found, self.weights, where)
    )

  def texts(
    self, paths: layouts.Paths, tokenizer: tokenize.Tokenizer, on_host: bool
  ) -> Texts:
    where = {"sharding": convert.host()} if on_host else {}
    path = paths.text_encoder
    encoder = self.of("umt5", path, **where, **self.in_blocks())
    if tokenizer.vocab > encoder.module.vocab:
      raise errors.UserError(
        f"{paths.tokenizer} has {tokenizer.vocab} tokens, more than the "
        f"{encoder.module.vocab} of {path}"
      )
    length = paths.text_tokens or tokenize.LENGTH
    return Texts(tokenizer, encoder, length, on_host)

  def clip(self, paths: layouts.Paths) -> LoadedModel:
    return self.of("clip_vision", paths.image_encoder, jnp.float32)

  def encoder(self, paths: layouts.Paths) -> latent_space.LatentSpace:
    if paths.wan_vae is not None:
      return self.space(paths, whole=True)
    half = self.of("dc_ae_v", paths.dc_ae_v, only=decoders.in_encoder)
    return spaces.DCAEVLatents(*half)

  def space(
    self, paths: layouts.Paths, whole: bool
  ) -> latent_space.LatentSpace:
    if paths.wan_vae is not None:
      # Half precision would be visible, and this model is small.
      vae = self.of("wan_vae", paths.wan_vae, jnp.float32)
      return spaces.WanVAELatents(*vae)
    path, other = paths.dc_ae_v, paths.decoder

    def read(only):
      return self.of("dc_ae_v", path, only=only)

    if other is None:
      module, variables = read(None if whole else decoders.in_decoder)
      decoder = module
    else:
      module, half = read(decoders.in_encoder if whole else lambda name: False)
      decoder, more = self.of("dc_ae_v_decoder", other)
      decoders.paired(module, decoder, other)
      variables = {"params": {**half["params"], **more["params"]}}
    if whole:
      return spaces.DCAEVLatents(module, variables, decoder)
    return decoder_first.DecoderFirst(
      module, variables, lambda: read(decoders.in_encoder).variables, decoder
    )


def _task_of(transformer: LoadedModel) -> str:
  return "t2v" if transformer.module.image_width is None else "i2v"


def _read_scheduler(path: pathlib.Path | None) -> flow.Options:
  if path is None:
    return DEFAULT_OPTIONS
  try:
    config = dict(documents.parse(path.read_bytes()))
  except (OSError, ValueError, TypeError) as e:
    raise errors.UserError(f"cannot read {path}: {e}") from e
  try:
    return flow.from_config(config)
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e


def check_channels(module: Any, space: latent_space.LatentSpace) -> None:
  """Checks that a transformer fits the latents of an autoencoder.

  Raises:
    errors.UserError: if their numbers of channels differ.
  """
  expected = space.channels
  if module.image_width is not None:
    expected = 2 * space.channels + space.temporal
  if (module.in_channels, module.out_channels) != (expected, space.channels):
    raise errors.UserError(
      f"the autoencoder has {space.channels} channels, so the transformer has "
      f"{expected} in and {space.channels} out, found {module.in_channels} and "
      f"{module.out_channels}"
    )
