"""Levels of pixels, uint8, and what models compute with, floats in [-1, 1].

One rule for all: level n is n / 127.5 - 1, and a float becomes the level that
is nearest; halfway between two, the upper one, as in the official evaluation
(DC-Gen `apps/metrics/psnr/psnr.py`, commit cae2205). So a video that is saved
and an array that is measured have the same levels.
"""

from typing import TypeVar

import jax
import numpy as np

Video = TypeVar("Video", jax.Array, np.ndarray)


def to_float(video: Video) -> Video:
  """uint8 levels as float32 in [-1, 1]; floats as they are."""
  if video.dtype != np.uint8:
    return video
  return video.astype(np.float32) / 127.5 - 1


def to_uint8(video: Video) -> Video:
  """Floats in [-1, 1] as the nearest levels, uint8, clamped."""
  video = video.astype(np.float32) * np.float32(127.5) + np.float32(128)
  return video.clip(0, 255).astype(np.uint8)
