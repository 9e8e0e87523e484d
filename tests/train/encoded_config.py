"""`configs/adapt.py` as small as "runlocal", but on encoded clips in files."""

import pathlib

import ml_collections
import numpy as np
from ml_collections import config_dict

from configs import adapt
from dcvideogen_jax.data import parts

_PART = 50


def get_config(arg: str) -> ml_collections.ConfigDict:
  """What `launch.train` is given; `data.path` is a folder of `write`."""
  c, whole = adapt.get_config(f"{arg},runlocal"), adapt.get_config(arg)
  text_tokens, _ = c.data.shapes.text
  for config in (c, c.val):
    config.data = {
      "source": "latents",
      "path": config_dict.placeholder(str),
      "keys": whole.data["keys"],
      "text_tokens": text_tokens,
      "latent_frames": config_dict.placeholder(int),
    }
  return c


def write(directory: pathlib.Path, count: int) -> None:
  """So many clips of random numbers, for text to video."""
  shapes = adapt.get_config("tiny_t2v,phase=head,runlocal").data.shapes
  random = np.random.default_rng(0)
  starts = range(0, count, _PART)
  parts.begin(directory, {})
  for number, start in enumerate(starts):
    with parts.Writer(directory, number, {}) as writer:
      for clip in range(start, min(count, start + _PART)):
        arrays = {
          name: random.normal(size=shapes[name]).astype(np.float32)
          for name in ("base", "deep", "text")
        }
        meta = {"file": f"{clip}.mp4", "captions": ["a"], "scores": None}
        writer.write("64x64", arrays | {"text": [arrays["text"]]}, meta)
  parts.finish(directory, len(starts))
