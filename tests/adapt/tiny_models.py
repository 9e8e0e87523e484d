"""Transformers of a few thousand parameters, and their variables."""

import functools

import jax

from dcvideogen_jax import convert
from dcvideogen_jax.models import wan_dit
from tests import random_weights

# Two heads of 8 numbers; the base's latents have 4 channels, the deep ones 6.
_T2V = {
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn_width": 24,
  "text_width": 12,
  "frequencies": 8,
}
_BASE = {"in_channels": 4, "out_channels": 4, "patch": (1, 2, 2)}
_DEEP = {"in_channels": 6, "out_channels": 6, "patch": (1, 1, 1)}
_IMAGE = {"image_width": 10}
FIELDS = {
  "base_t2v": {**_T2V, **_BASE},
  "base_i2v": {**_T2V, **_BASE, **_IMAGE, "in_channels": 12},
  "deep_t2v": {**_T2V, **_DEEP},
  "deep_i2v": {**_T2V, **_DEEP, **_IMAGE, "in_channels": 16},
}


def module(name, **changes):
  return wan_dit.build(FIELDS[name], **changes)


@functools.cache
def abstract(module):
  """Returns the module's variables as shapes and dtypes."""
  example = convert.KINDS["wan_dit"].example(module)
  return jax.eval_shape(module.init, jax.random.key(0), *example)


def variables(module, seed=0, scale=0.2):
  """Returns random variables, without the zeros and ones of initialisers."""
  return random(abstract(module), seed, scale)


def random(abstract, seed=0, scale=0.2):
  """Returns random arrays for a tree of shapes and dtypes."""
  return random_weights.like(abstract, seed, scale=scale)
