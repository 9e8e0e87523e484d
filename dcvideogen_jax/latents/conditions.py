"""Encodes texts, images and clips into the inputs of the diffusion model.

`text`, `image` and `clips` are pure functions, for a training step that
contains the frozen encoders. `encode_text` and `encode_images` are compiled,
for sampling and for precomputation.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import clip_vision, umt5

Picture = UInt8[np.ndarray, "h w 3"]


def resize(
  image: Picture, height: int, width: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Stretches an image to a size with Pillow's bicubic filter, as DC-Gen does.

  Args:
    image: RGB levels.
    height: height of the result in pixels.
    width: width of the result in pixels.
  """
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(PIL.Image.fromarray(image).resize((width, height)))


def pad(image: Picture, grid: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Pads an image to a size by repeating its last row and column.

  Args:
    image: RGB levels, not larger than the grid.
    grid: height and width of the result, in pixels.
  """
  missing = [n - m for n, m in zip(grid, image.shape[:2], strict=True)]
  return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")


def text(
  module: umt5.UMT5Encoder,
  variables: spaces.Variables,
  ids: Int[Array, "b s"],
  mask: Int[Array, "b s"],
) -> Float[Array, "b s e"]:
  """Returns the embeddings of texts in float32, with zeros as padding.

  Args:
    module: the text encoder.
    variables: `{"params": ...}` of the encoder.
    ids: token ids, as `data.tokenize` gives them.
    mask: 1 for tokens of the text, 0 for padding.
  """
  hidden = module.apply(variables, ids, mask)
  return umt5.zero_padding(hidden, mask).astype(jnp.float32)


def image(
  module: clip_vision.CLIPVision,
  variables: spaces.Variables,
  pixels: Float[Array, "b h w 3"],
) -> Float[Array, "b m e"]:
  """Returns CLIP's features of images, computed in float32.

  Args:
    module: CLIP's vision tower.
    variables: `{"params": ...}` of the tower.
    pixels: images that `data.clip_images` has resized and normalised.

  Returns:
    One feature for each of the m tokens of an image.
  """
  return module.clone(dtype=jnp.float32).apply(variables, pixels)


def extra(
  mask: Float[np.ndarray, "t f"], encoded: Float[Array, "b t h w c"]
) -> Float[np.ndarray, "b t h w f+c"]:
  """Joins the mask and the encoded images, for an image-to-video model.

  The transformer concatenates the result with the noisy latents, along
  channels.

  Args:
    mask: `LatentSpace.mask`: for each latent frame, which of its f video frames
      show an image.
    encoded: latents of the condition video.
  """
  mask = np.broadcast_to(
    mask[:, None, None], (*encoded.shape[:-1], mask.shape[-1])
  )
  return np.concatenate([mask, sharding.to_host(encoded)], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(module, variables, ids, mask) -> Float[Array, "b s e"]:
  """Runs `text` compiled, in the module's dtype; every device gets the result.

  Args:
    module, variables, ids, mask: as for `text`.
  """
  hidden = module.apply(variables, ids, mask)
  return sharding.constrain(umt5.zero_padding(hidden, mask))


@functools.partial(jax.jit, static_argnums=0)
def encode_images(module, variables, pixels) -> Float[Array, "b m e"]:
  """Runs `image` compiled; every device of the mesh gets the result.

  Args:
    module, variables, pixels: as for `image`.
  """
  return sharding.constrain(image(module, variables, pixels))


def clips(
  modules: Mapping[str, object],
  variables: Mapping[str, spaces.Variables],
  batch: Mapping[str, Array],
) -> dict[str, Array]:
  """Encodes a batch of raw clips into the arrays that `data.latents` reads.

  Args:
    modules: the autoencoders "base" and "deep" and the encoders "text" and
      "image". Any of them may be missing. With "image", the condition videos
      are encoded too.
    variables: `{"params": ...}` of each module, by the same names.
    batch: a batch of `data.captioned`: "video", "ids", "mask" and, for "image",
      "pixels".

  Returns:
    "base", "deep", "base_condition", "deep_condition", "text" and "image", as
    far as their modules are given.
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
