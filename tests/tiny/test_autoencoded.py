"""The scorer reads clips that the shipped tiny autoencoder reconstructed."""

import pathlib

import jax
import numpy as np
import pytest

import dcvideogen_jax
from dcvideogen_jax import convert
from dcvideogen_jax.tiny import scorer, world

TINY = pathlib.Path(dcvideogen_jax.__file__).parent / "assets" / "dc_ae_v_tiny"


@pytest.mark.slow
def test_autoencoded_clips_are_read():
  module, variables = convert.load("dc_ae_v", TINY)
  scenes, _, videos = zip(
    *(world.clip("heldout", i) for i in range(200)), strict=True
  )

  @jax.jit
  def again(x):
    return module.apply(variables, x)

  readings = []
  for i in range(0, len(videos), 8):
    x = np.stack(videos[i : i + 8]).astype(np.float32) / 127.5 - 1
    found = np.clip((np.asarray(again(x)) + 1) * 127.5, 0, 255)
    readings += map(scorer.read, np.rint(found).astype(np.uint8))
  assert scorer.score(readings, scenes)["all"] >= 0.97
