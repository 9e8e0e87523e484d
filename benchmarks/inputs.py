"""Random weights and clips that are the same in every process."""

import math
import zlib

import numpy as np


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Makes a random float32 tensor of an official state dict.

  The name seeds the values. Convolution and linear weights preserve the
  variance of their input, norms scale by about 1, and biases are small.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape, np.float32)
  if len(shape) > 1:
    x *= math.prod(shape[1:]) ** -0.5
    return x
  x *= 0.1
  if name.endswith(".weight"):
    x += 1
  return x


def clip(shape: tuple[int, ...]) -> np.ndarray:
  """Makes a float32 video in [-1, 1]: smooth along every axis, plus noise."""
  rng = np.random.default_rng(0)
  axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
  waves = (np.sin(2 * np.pi * (3 + i) * axis) for i, axis in enumerate(axes))
  video = sum(waves) / len(axes) + 0.1 * rng.standard_normal(shape)
  return np.clip(video, -1, 1).astype(np.float32)
