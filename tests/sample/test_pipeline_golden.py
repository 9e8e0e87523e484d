"""The pipeline end to end against the official one on tiny random models.

Golden numbers are of DC-Gen's `DCVideoGenWan{Text,Image}ToVideoPipeline`
(commit cae2205) with diffusers 0.42.1: its newer UniPC grid is asked for.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.sample import loading, pipeline
from tests import golden_data

AUTOENCODER = {
  "latent_channels": 32,
  "widths": (8, 8, 8, 8, 16, 16, 16),
  "depths": (0, 1, 1, 1, 1, 1, 1),
  "chunk_frames": 8,
  "latent_scale": 0.7241,
}
CASES = [
  ("dc_t2v_e2e", "cfg5"),
  ("dc_i2v_e2e", "cfg5"),
  ("dc_i2v_e2e", "last_image"),
]
SIZE = {"height": 32, "width": 96, "frames": 16}


def load(name):
  """Loads the golden pipeline without encoders: embeddings are given."""
  path = golden_data.GOLDEN / "pipeline" / f"{name}.json"
  config = json.loads(path.read_text())
  weights = golden_data.weights("pipeline", name)
  parts = {
    prefix: {
      key.removeprefix(prefix): x
      for key, x in weights.items()
      if key.startswith(prefix)
    }
    for prefix in ("ae.", "dit.")
  }
  dit = {"_class_name": "WanTransformer3DModel", **config["dit_config"]}
  space = convert.load("dc_ae_v", parts["ae."], AUTOENCODER)
  scheduler = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.42.1",
    **config["scheduler_config"],
  }
  return pipeline.DCVideoGen(
    loading.Parts(
      loading.LoadedModel(*convert.load("wan_dit", parts["dit."], dit)),
      spaces.DCAEVLatents(*space),
      options=flow.from_config(scheduler),
    )
  )


def _image(x):
  """Converts the golden image, [0, 1] `1 c h w`, to [-1, 1] `h w c`."""
  return np.moveaxis(x[0], 0, -1) * 2 - 1


def _video(name, case):
  """Returns the golden video, float in [0, 1], `b t h w c`."""
  path = golden_data.GOLDEN / "pipeline" / f"{name}.io.safetensors"
  video = safetensors.numpy.load_file(path)[f"out.{case}.video"]
  return np.moveaxis(video, 2, -1)


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("one_program", [False, True])
def test_every_step_and_the_video(name, case, one_program):
  made = load(name)
  io = golden_data.io("pipeline", name)
  wanted = {
    key.removeprefix(f"out.{case}."): x
    for key, x in io.items()
    if key.startswith(f"out.{case}.")
  }
  condition = None
  if name == "dc_i2v_e2e":
    last = _image(io["in.last_image"]) if case == "last_image" else None
    space = made.parts.space
    encoded = space.condition(_image(io["in.image"]), last, 16, 1e9)
    mask = np.broadcast_to(
      space.mask(16, last is not None)[None, :, None, None], (1, 4, 1, 3, 4)
    )
    extra = jnp.concatenate([jnp.asarray(mask), encoded], axis=-1)
    np.testing.assert_allclose(extra, wanted["condition"], atol=2e-5, rtol=0)
    condition = {"image": jnp.asarray(io["in.image_embeds"]), "extra": extra}

  steps = []
  made_video = made.generate(
    io["in.prompt_embeds"],
    negative_prompt=io["in.negative_prompt_embeds"],
    condition=condition,
    noise=io["in.latents"],
    steps=4,
    guidance_scale=5.0,
    one_program=one_program,
    on_step=None if one_program else lambda i, x: steps.append(np.asarray(x)),
    **SIZE,
  )
  if not one_program:
    np.testing.assert_allclose(
      np.stack(steps), wanted["latents_per_step"], atol=5e-5, rtol=0
    )
  np.testing.assert_allclose(
    made_video.latents, wanted["latents"], atol=5e-5, rtol=0
  )
  video = made_video.video()
  assert video.shape == (1, 16, 32, 96, 3)
  levels = 255 * _video(name, case)
  assert np.abs(video - levels).max() < 0.5 + 255 * 5e-5
