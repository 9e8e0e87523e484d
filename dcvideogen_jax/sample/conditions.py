"""Texts and images as the diffusion model is told of them."""

import functools

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array, Float

from dcvideogen_jax import sharding
from dcvideogen_jax.models import umt5
from dcvideogen_jax.sample import arguments


def resize(image: arguments.Image, height: int, width: int) -> arguments.Image:
  """Stretches an image to a size, bicubic as Pillow does, like DC-Gen."""
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(PIL.Image.fromarray(image).resize((width, height)))


def pad(image: arguments.Image, grid: tuple[int, int]) -> arguments.Image:
  """Repeats the last row and column until the image has the grid's pixels."""
  missing = [n - m for n, m in zip(grid, image.shape[:2], strict=True)]
  return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")


@functools.partial(jax.jit, static_argnums=0)
def encode_text(module, variables, ids, mask) -> Float[Array, "b s d"]:
  """Embeddings that are zero after the text's end, on all devices."""
  hidden = module.apply(variables, ids, mask)
  return sharding.constrain(umt5.zero_padding(hidden, mask))


@functools.partial(jax.jit, static_argnums=0)
def encode_images(module, variables, pixels) -> Float[Array, "b m e"]:
  """CLIP features of preprocessed images, on all devices."""
  return sharding.constrain(module.apply(variables, pixels))
