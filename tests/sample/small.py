"""Pipelines of small random models."""

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import clip_vision, dc_ae_v, umt5, wan_dit
from dcvideogen_jax.sample import loading, pipeline
from tests import random_weights

AUTOENCODER = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 8),
  "depths": (0, 1, 1, 1),
  "chunk_frames": 8,
  "spatial_factor": 4,
  "latent_scale": 0.9,
}
DIT = {
  "layers": 2,
  "width": 24,
  "heads": 2,
  "ffn_width": 32,
  "in_channels": 4,
  "out_channels": 4,
  "patch": (1, 1, 1),
  "text_width": 8,
  "frequencies": 16,
}
IMAGE = {"in_channels": 12, "image_width": 16}
CLIP = {
  "image_size": 28,
  "patch": 14,
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn_width": 32,
}
ENCODER = {
  "vocab": 32,
  "layers": 1,
  "width": 8,
  "heads": 2,
  "head_width": 4,
  "ffn_width": 16,
}
TEXT = np.random.default_rng(5).normal(size=(1, 6, 8)).astype(np.float32)
NEGATIVE = np.random.default_rng(6).normal(size=(1, 6, 8)).astype(np.float32)
PHOTO = np.random.default_rng(7).integers(0, 256, (30, 50, 3), dtype=np.uint8)


class Letters:
  """A tokenizer that records the prompts it gets."""

  vocab = 32

  def __init__(self):
    self.asked = []

  def count(self, prompts):
    return np.array([len(text) + 1 for text in prompts])

  def __call__(self, prompts, length):
    self.asked += prompts
    padded = [text[:length].ljust(length) for text in prompts]
    ids = [[3 + ord(c) % 28 for c in text] for text in padded]
    mask = [[int(i <= len(text)) for i in range(length)] for text in prompts]
    return np.asarray(ids, np.int32), np.asarray(mask, np.int32)


def _part(module, *shapes):
  variables = random_weights.of(module, *shapes, seed=0)
  return loading.LoadedModel(module, variables)


def _float(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def make(task="t2v", texts=False, **fields):
  """Makes a pipeline of small random models."""
  dit = wan_dit.build({**DIT, **(IMAGE if task == "i2v" else {}), **fields})
  arguments = [_float(1, *dit.patch, dit.in_channels), _float(1), TEXT]
  clip = None
  if task == "i2v":
    arguments.append(_float(1, dit.image_positions or 5, 16))
    clip = _part(clip_vision.build(CLIP), _float(1, 28, 28, 3))
  tokens = jax.ShapeDtypeStruct((1, 10), jnp.int32)
  encoder = _part(umt5.build(ENCODER), tokens, tokens)
  return pipeline.DCVideoGen(
    loading.Parts(
      _part(dit, *arguments),
      spaces.DCAEVLatents(
        *_part(dc_ae_v.build(AUTOENCODER), _float(1, 8, 4, 4, 3))
      ),
      loading.Texts(Letters(), encoder, 10) if texts else None,
      clip,
    )
  )


def run(made, **changes):
  arguments = {
    "negative_prompt": NEGATIVE,
    "height": 10,
    "width": 18,
    "frames": 10,
    "steps": 2,
    **changes,
  }
  return made.generate(arguments.pop("prompt", TEXT), **arguments)
