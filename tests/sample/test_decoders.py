"""The decoder that a pipeline is asked for: found, checked and used."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.sample import decoders, loading, pipeline
from tests import random_weights
from tests.sample import published

FAST = published.AUTOENCODER | {"widths": (8, 4, 8, 8)}


def write_decoder(path, **changes):
  module = dc_ae_v.build(FAST | changes)
  shapes = convert.KINDS["dc_ae_v_decoder"].init(module)
  variables = random_weights.like(shapes, seed=4, norms=1.0)
  convert.save(path, "dc_ae_v_decoder", module, variables)
  return module, variables


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Text and image to video, with the fast decoder beside the autoencoder."""
  directory = tmp_path_factory.mktemp("models")
  found = {}
  for name in ("dc_t2v", "dc_i2v"):
    found[name[3:]] = directory / name
    published.write(directory / name, "elsewhere", name)
    made = write_decoder(directory / name / "shared" / "autoencoder_fast")
  return found, made


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_model_with_its_fast_decoder(models, task):
  sources, (module, variables) = models
  made = pipeline.DCVideoGen.from_pretrained(
    sources[task], task=task, decoder="fast"
  )
  space = made.parts.space
  assert space.decoder(jnp.float32) == module
  own = published.model("dc_ae_v").variables["params"]
  loaded = space.variables["params"]
  assert loaded.keys() == {"decoder"} | (
    {"encoder"} if task == "i2v" else set()
  )
  space.load_encoder()
  loaded = space.variables["params"]
  halves = {"encoder": own["encoder"], **variables["params"]}
  for name, expected in halves.items():
    jax.tree.map(np.testing.assert_array_equal, loaded[name], expected)
  latents = np.random.default_rng(0).normal(size=(1, 2, 4, 4, 4))
  found = np.concatenate(
    [*space.decode(jnp.float32(latents), (8, 16, 16), jnp.float32, 2.0**30)]
  )
  whole = random_weights.jitted(module, "decode")
  expected = np.asarray(whole(variables, jnp.float32(latents) / 0.9))
  expected = np.clip(127.5 * (expected + 1), 0, 255)
  assert np.abs(found - expected).max() < 0.6
  assert made.parts.files["decoder"].endswith("shared/autoencoder_fast")


def test_a_path_is_a_decoder_too(models, tmp_path):
  sources, _ = models
  module, _ = write_decoder(tmp_path / "mine", depths=(0, 1, 2, 1))
  parts = loading.load(sources["t2v"], decoder=str(tmp_path / "mine"))
  assert parts.space.decoder(jnp.float32).depths == module.depths


@pytest.mark.parametrize(
  ("name", "value"),
  [("latent_scale", 0.8), ("latent_channels", 3), ("chunk_frames", 4)],
)
def test_a_decoder_of_other_latents(models, tmp_path, name, value):
  sources, _ = models
  write_decoder(tmp_path / "other", **{name: value})
  expected = published.AUTOENCODER[name]
  with pytest.raises(
    errors.UserError,
    match=f"of another model: expected {name} {expected}, found {value}",
  ):
    loading.load(sources["t2v"], decoder=str(tmp_path / "other"))


def test_without_one_the_config_that_trains_it_is_named(
  models, tmp_path, monkeypatch
):
  sources, _ = models
  model = tmp_path / "dc-ae-v-1.0"
  shutil.copytree(sources["t2v"] / "shared" / "autoencoder", model)
  with pytest.raises(errors.UserError) as refused:
    decoders.load(model, "fast")
  command = (
    f"--config=configs/tiny.py:autoencoder,phase=fast --config.weights={model}"
    f" --export={model}_fast"
  )
  assert f"no decoder {model}_fast for" in str(refused.value)
  assert command in str(refused.value)
  monkeypatch.setitem(dc_ae_v.VARIANTS, "f32t4c32", published.AUTOENCODER)
  for load in (loading.load, loading.texts):
    with pytest.raises(errors.UserError, match="dc_ae_v.py:f32t4c32,phase=fa"):
      load(sources["t2v"], autoencoder=model, decoder="fast")
  weights = model / "model.safetensors"
  write_decoder(model / "model_fast")
  assert decoders.find(weights, "fast") == model / "model_fast"


def test_wans_autoencoder_has_one_decoder(tmp_path):
  published.write(tmp_path / "wan", "diffusers", "wan_t2v")
  with pytest.raises(errors.UserError, match="a model with DC-AE-V, found Wan"):
    loading.load(tmp_path / "wan", decoder="fast")
