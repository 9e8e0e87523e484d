"""Converts pixels between uint8 levels and the models' floats in [-1, 1].

The whole library follows one rule. Level n is n / 127.5 - 1. A float becomes
the nearest level; halfway between two levels it becomes the upper one, as in
the official evaluation (DC-Gen `apps/metrics/psnr/psnr.py`, commit cae2205). So
a video that is saved and an array that is measured have the same levels.
"""

from typing import TypeVar

import jax
import numpy as np

Video = TypeVar("Video", jax.Array, np.ndarray)


def to_float(video: Video) -> Video:
  """Converts uint8 levels to float32 in [-1, 1]; returns floats unchanged."""
  if video.dtype != np.uint8:
    return video
  return video.astype(np.float32) / 127.5 - 1


def to_uint8(video: Video) -> Video:
  """Converts floats in [-1, 1] to the nearest uint8 levels, clamped."""
  video = video.astype(np.float32) * np.float32(127.5) + np.float32(128)
  return video.clip(0, 255).astype(np.uint8)
