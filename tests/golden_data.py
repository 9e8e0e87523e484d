"""Reads `tests/golden`."""

import functools
import pathlib

import numpy as np
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Configurations of the tiny random autoencoders in `golden/dc_ae_v`.
DC_AE_V = {
  "f32t4_chunk8": {
    "latent_channels": 8,
    "widths": (8, 12, 24, 24, 48, 48, 48),
    "depths": (0, 1, 2, 1, 1, 1, 1),
    "chunk_frames": 8,
  },
  "f64t4_chunk8": {
    "latent_channels": 8,
    "widths": (8, 8, 8, 16, 16, 16, 32, 32),
    "depths": (0, 1, 2, 1, 1, 1, 1, 1),
    "chunk_frames": 8,
    "spatial_factor": 64,
  },
}

# A smaller one, for properties: three halvings only.
SMALL = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 16, 16),
  "depths": (0, 1, 2, 1, 1),
  "chunk_frames": 8,
  "spatial_factor": 8,
}

# A Wan autoencoder as small, whose normalisation changes its latents.
WAN_SMALL = {
  "latent_channels": 2,
  "base_width": 4,
  "multipliers": [1, 1, 1],
  "temporal": [True, True],
  "blocks": 1,
  "mean": [0.5, -0.25],
  "std": [2.0, 0.5],
}


@functools.cache
def weights(folder: str, name: str) -> dict[str, np.ndarray]:
  return load_file(GOLDEN / folder / f"{name}.weights.safetensors")


@functools.cache
def io(folder: str, name: str) -> dict[str, np.ndarray]:
  """Inputs and outputs; all but images are made channels last."""
  return {
    key: np.moveaxis(x, -4, -1) if x.ndim >= 5 else x
    for key, x in load_file(GOLDEN / folder / f"{name}.io.safetensors").items()
  }
