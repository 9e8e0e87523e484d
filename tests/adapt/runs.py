"""Configs of the phases for the transformers of `tiny_models`, and batches."""

import numpy as np

from tests.adapt import tiny_models

FRAMES, TEXT = 2, 5
# Latents per side: with patches of 2 the base has twice the tokens per side.
_SIDES = {"base": 8, "deep": 2}
_CHANNELS = {"base": 4, "deep": 6}


def config(phase="head", kind="t2v", **changes):
  """Returns a config that needs no files; the phase "base" trains the base."""
  space = "base" if phase == "base" else "deep"
  found = {
    "task": "align" if phase == "embed" else "denoise",
    "phase": phase,
    "seed": 0,
    "model": tiny_models.FIELDS[f"{space}_{kind}"],
    "base": tiny_models.FIELDS[f"base_{kind}"],
    "space": space,
    "dtype": "float32",
    "frozen_dtype": "float32",
    "align": {"loss": "pool", "upsample": "nearest"},
    "lora": {"rank": 3, "alpha": 6.0},
    "levels": {"draw": "uniform", "shift": 8.0, "weighted": True},
    "forcing": None,
    "text_dropout": 0.1,
    "negative": None,
    "encoders": None,
    "start": {
      "base": None,
      "weights": None,
      "patch_embed": None,
      "head": "zero",
      "random": True,
    },
  }
  return found | changes


def started(phase, **start):
  """Returns the changes of a config that starts from files."""
  defaults = config(phase)["start"] | {"random": False}
  return {"start": defaults | {k: v and str(v) for k, v in start.items()}}


def batch(size=4, kind="t2v", text=TEXT, seed=0, frames=FRAMES):
  """Returns a batch like `data.latents`; texts end before the last token."""
  rng = np.random.default_rng(seed)

  def random(*shape):
    return rng.normal(size=(size, *shape)).astype(np.float32)

  found = {"text": random(text, 12)}
  found["text"][:, text - 2 :] = 0
  for space, side in _SIDES.items():
    shape = (frames, side, side, _CHANNELS[space])
    found[space] = random(*shape)
    if kind == "i2v":
      found[f"{space}_condition"] = random(*shape)
  if kind == "i2v":
    found["image"] = random(3, 10)
  return found
