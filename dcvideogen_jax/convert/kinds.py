"""The kinds of model that can be converted, with what the loader needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcvideogen_jax.convert import clip_vision as clip_vision_table
from dcvideogen_jax.convert import dc_ae_v as dc_ae_v_table
from dcvideogen_jax.convert import naming
from dcvideogen_jax.convert import umt5 as umt5_table
from dcvideogen_jax.convert import wan_dit as wan_dit_table
from dcvideogen_jax.convert import wan_vae as wan_vae_table
from dcvideogen_jax.models import clip_vision, dc_ae_v, umt5, wan_dit, wan_vae

Fields = Mapping[str, Any]


def _nothing(_: Any) -> None:
  """Returns None, as the default of `config_from` and `infer`."""


class Kind(NamedTuple):
  """The tables and functions with which a kind of model is loaded and written.

  Attributes:
    layouts: name of a layout -> its rules; the first is written by default.
    variants: released configurations by name.
    build: configuration -> module.
    example: module -> shapes and dtypes of the arguments of `method`.
    ignored: regular expressions of PyTorch names that are not loaded, because
      the model here has no such parameter.
    aliases: additional PyTorch names -> names in the layouts, for an array of
      the model that a file may store under either name.
    config_from: another library's config.json -> configuration, or None if it
      is another model's; raises `errors.UserError` for a setting that the model
      here does not have.
    configs: layout -> function from a configuration to the config.json of the
      library with that layout.
    infer: shapes by JAX name -> configuration, or None if it does not follow
      from them.
    files: patterns (`*` for any characters) of the names of the weights in a
      directory that holds several models.
    stem: file name of the weights, without suffix, in another library's
      directory.
    method: of the module; the parameters that it uses are the model's.
  """

  layouts: Mapping[str, Sequence[naming.Rule]]
  variants: Mapping[str, Fields]
  build: Callable[..., nn.Module]
  example: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
  ignored: Sequence[str] = ()
  aliases: Mapping[str, str] = {}
  config_from: Callable[[Fields], Fields | None] = _nothing
  configs: Mapping[str, Callable[[Fields], dict[str, Any]]] = {}
  infer: Callable[[Mapping[str, naming.Shape]], Fields | None] = _nothing
  files: Sequence[str] = ()
  stem: str = "diffusion_pytorch_model"
  method: str = "__call__"

  def init(self, module: Any) -> Any:
    """Returns the shapes and dtypes of a module's variables."""
    return jax.eval_shape(
      lambda key, *x: module.init(key, *x, method=self.method),
      jax.random.key(0),
      *self.example(module),
    )


def _float(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _video(module: dc_ae_v.DCAEV) -> tuple[jax.ShapeDtypeStruct, ...]:
  size = module.spatial_factor
  return (_float(1, module.frames_multiple, size, size, 3),)


def _deep(module: dc_ae_v.DCAEV) -> tuple[jax.ShapeDtypeStruct, ...]:
  frames = module.frames_multiple // module.temporal_factor
  return (_float(1, frames, 1, 1, module.latent_channels),)


def _latents(module: wan_dit.WanDiT) -> tuple[jax.ShapeDtypeStruct, ...]:
  arguments = (
    _float(1, *module.patch, module.in_channels),
    _float(1),
    _float(1, 1, module.text_width),
  )
  if module.image_width is None:
    return arguments
  tokens = module.image_positions or 1
  return (*arguments, _float(1, tokens, module.image_width))


def _frames(module: wan_vae.WanVAE) -> tuple[jax.ShapeDtypeStruct, ...]:
  size = 2 ** len(module.temporal)
  return (_float(1, 1, size, size, 3),)


def _tokens(module: umt5.UMT5Encoder) -> tuple[jax.ShapeDtypeStruct, ...]:
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return ids, ids


def _image(
  module: clip_vision.CLIPVision,
) -> tuple[jax.ShapeDtypeStruct, ...]:
  return (_float(1, module.image_size, module.image_size, 3),)


KINDS = {
  "dc_ae_v": Kind(
    {"official": dc_ae_v_table.RULES},
    dc_ae_v.VARIANTS,
    dc_ae_v.build,
    _video,
    files=("dc-ae-v*.pt",),
  ),
  "dc_ae_v_decoder": Kind(
    {"official": dc_ae_v_table.DECODER_RULES},
    dc_ae_v.FAST,
    dc_ae_v.build,
    _deep,
    method="decode",
  ),
  "wan_dit": Kind(
    wan_dit_table.LAYOUTS,
    wan_dit.VARIANTS,
    wan_dit.build,
    _latents,
    ignored=wan_dit_table.IGNORED,
    config_from=wan_dit_table.config_from,
    configs=wan_dit_table.CONFIGS,
    infer=wan_dit_table.infer,
    files=("diffusion_pytorch_model*.safetensors*",),
  ),
  "wan_vae": Kind(
    wan_vae_table.LAYOUTS,
    wan_vae.VARIANTS,
    wan_vae.build,
    _frames,
    ignored=wan_vae_table.IGNORED,
    config_from=wan_vae_table.config_from,
    configs={"diffusers": wan_vae_table.config_to},
    files=("Wan2.1_VAE*.pth",),
  ),
  "umt5": Kind(
    umt5_table.LAYOUTS,
    umt5.VARIANTS,
    umt5.build,
    _tokens,
    ignored=umt5_table.IGNORED,
    aliases=umt5_table.ALIASES,
    config_from=umt5_table.config_from,
    configs={"transformers": umt5_table.config_to},
    files=("models_t5_*.pth",),
    stem="model",
  ),
  "clip_vision": Kind(
    clip_vision_table.LAYOUTS,
    clip_vision.VARIANTS,
    clip_vision.build,
    _image,
    ignored=clip_vision_table.IGNORED,
    config_from=clip_vision_table.config_from,
    configs={"transformers": clip_vision_table.config_to},
    files=("models_clip_*.pth",),
    stem="model",
  ),
}
