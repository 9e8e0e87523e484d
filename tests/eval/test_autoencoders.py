"""Clips through autoencoders, whole and in pieces."""

import functools

import jax
import numpy as np
import pytest

from dcvideogen_jax import errors, levels
from dcvideogen_jax.eval import autoencoders
from dcvideogen_jax.models import dc_ae_v, wan_vae
from tests import random_weights

DC_AE_V = {
  "latent_channels": 4,
  "widths": [4, 4, 4],
  "depths": [0, 1, 1],
  "chunk_frames": 4,
  "spatial_factor": 2,
  "temporal_factor": 2,
}
WAN = {
  "latent_channels": 4,
  "base_width": 4,
  "multipliers": (1, 2, 2),
  "blocks": 1,
  "temporal": (True, True),
  "mean": (0.5, -0.5, 1, 0),
  "std": (2, 1, 0.5, 3),
}
# 11 frames: neither whole chunks nor 1 + 4k; 7 rows are padded.
CLIP = np.random.default_rng(0).integers(0, 256, (11, 7, 8, 3), np.uint8)

_ROW = ((0, 0), (0, 1), (0, 0), (0, 0))


@functools.cache
def loaded(time):
  """A module and its variables, of Wan's autoencoder or of that design."""
  example = jax.ShapeDtypeStruct((1, 13, 8, 8, 3), np.float32)
  module = wan_vae.build(WAN)
  if time != "wan":
    example = jax.ShapeDtypeStruct((1, 4, 8, 8, 3), np.float32)
    module = dc_ae_v.build({**DC_AE_V, "time": time})
  return module, random_weights.of(module, example)


@pytest.mark.parametrize("time", ["chunk_causal", "causal", "wan"])
def test_a_whole_clip(time):
  """By the modules' own methods, with the last frame repeated to 13 or 12."""
  module, variables = loaded(time)
  found = autoencoders.whole(module, variables, "float32")(CLIP)
  copies = np.repeat(CLIP[-1:], (13 if time == "wan" else 12) - 11, axis=0)
  video = np.pad(np.concatenate([CLIP, copies]), _ROW, "edge")
  output = jax.jit(module.apply)(variables, levels.to_float(video)[None])
  expected = levels.to_uint8(np.asarray(output))[0, :11, :7]
  assert found.shape == CLIP.shape and len(np.unique(expected)) > 50
  assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
  ("time", "rounding", "most"),
  [
    ("chunk_causal", "float32", 1),
    ("causal", "bfloat16", 2),
    ("wan", "float32", 1),
  ],
)
def test_pieces_are_those_of_the_whole_clip(time, rounding, most):
  module, variables = loaded(time)
  whole = autoencoders.whole(module, variables, rounding)(CLIP)
  run = autoencoders.in_pieces(module, variables, rounding)
  pairs = [*run(np.split(CLIP, [3, 4]))]
  truth, found = (np.concatenate(side) for side in zip(*pairs, strict=True))
  np.testing.assert_array_equal(truth, CLIP)
  off = np.abs(found.astype(int) - whole)
  assert off.max() <= most and np.mean(off > 0) < 0.01
  assert max(len(x) for x, _ in pairs) <= 4


def test_a_non_causal_autoencoder_has_no_pieces():
  module = dc_ae_v.build({**DC_AE_V, "time": "non_causal"})
  with pytest.raises(errors.UserError, match="sees a clip as a whole"):
    autoencoders.in_pieces(module, {}, "float32")
