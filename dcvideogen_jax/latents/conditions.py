"""Texts, images and whole clips as the diffusion model is told of them.

Pure functions, for training from raw video with the frozen encoders in the
step, and the same compiled, for sampling and for encoding beforehand.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Int, UInt8

from dcvideogen_jax import sharding
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import clip_vision, umt5

Picture = UInt8[np.ndarray, "h w 3"]


def resize(image: Picture, height: int, width: int) -> Picture:
  """Stretches an image to a size, bicubic as Pillow does, like DC-Gen."""
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(PIL.Image.fromarray(image).resize((width, height)))


def pad(image: Picture, grid: tuple[int, int]) -> Picture:
  """Repeats the last row and column until the image has the grid's pixels."""
  missing = [n - m for n, m in zip(grid, image.shape[:2], strict=True)]
  return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")


def text(
  module: umt5.UMT5Encoder,
  variables: spaces.Variables,
  ids: Int[Array, "b s"],
  mask: Int[Array, "b s"],
) -> Float[Array, "b s e"]:
  """Embeddings of texts, zero after each text's end, float32."""
  hidden = module.apply(variables, ids, mask)
  return umt5.zero_padding(hidden, mask).astype(jnp.float32)


def image(
  module: clip_vision.CLIPVision,
  variables: spaces.Variables,
  pixels: Float[Array, "b h w 3"],
) -> Float[Array, "b m e"]:
  """CLIP's features of what `data.clip_images` prepared, float32."""
  return module.clone(dtype=jnp.float32).apply(variables, pixels)


def extra(
  mask: Float[np.ndarray, "t f"], encoded: Float[Array, "b t h w c"]
) -> Float[np.ndarray, "b t h w f+c"]:
  """What image-to-video models get of each frame: a mask, encoded images."""
  mask = np.broadcast_to(
    mask[:, None, None], (*encoded.shape[:-1], mask.shape[-1])
  )
  return np.concatenate([mask, sharding.to_host(encoded)], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(module, variables, ids, mask) -> Float[Array, "b s e"]:
  """As `text`, in the module's dtype, on all devices."""
  hidden = module.apply(variables, ids, mask)
  return sharding.constrain(umt5.zero_padding(hidden, mask))


@functools.partial(jax.jit, static_argnums=0)
def encode_images(module, variables, pixels) -> Float[Array, "b m e"]:
  """As `image`, on all devices."""
  return sharding.constrain(image(module, variables, pixels))


def clips(
  modules: Mapping[str, object],
  variables: Mapping[str, spaces.Variables],
  batch: Mapping[str, Array],
) -> dict[str, Array]:
  """Raw clips as `data.latents` would give them.

  Args:
    modules: the autoencoders "base" and "deep", "text" and "image", of which
      any may be missing; with "image", conditions are encoded too.
    variables: of each.
    batch: of `data.captioned`: "video", "ids", "mask" and, for "image",
      "pixels".

  Returns:
    "base", "deep", "base_condition", "deep_condition", "text" and "image".
  """
  models = {name: (modules[name], variables[name]) for name in modules}
  video = batch["video"]
  arrays = {}
  for name, kind in spaces.SPACES.items():
    if name in models:
      space = kind(*models[name])
      arrays[name] = space.encode_whole(video)
      if "image" in models:
        arrays[f"{name}_condition"] = space.encode_first(
          video[:, 0], video.shape[1]
        )
  if "text" in models:
    arrays["text"] = text(*models["text"], batch["ids"], batch["mask"])
  if "image" in models:
    arrays["image"] = image(*models["image"], batch["pixels"])
  return arrays
