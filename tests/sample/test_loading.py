"""Every published layout loads and samples; missing parts are named."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.sample import loading, pipeline
from tests.sample import published

PHOTO = np.random.default_rng(7).integers(0, 256, (30, 50, 3), dtype=np.uint8)
SIZES = {
  "dc": {"height": 10, "width": 18, "frames": 10},
  "wan": {"height": 32, "width": 48, "frames": 5},
}


def load(source, name, **options):
  task = "t2v" if name.endswith("t2v") else "i2v"
  return loading.load(source, task=task, load_model=published.load, **options)


def sample(parts, name, **changes):
  """Samples one step from a prompt."""
  images = {} if name.endswith("t2v") else {"image": PHOTO}
  if name == "wan_flf2v":
    images["last_image"] = PHOTO[::-1]
  made = pipeline.DCVideoGen(parts)
  arguments = {
    "negative_prompt": "blurred",
    "steps": 1,
    **SIZES[name.partition("_")[0]],
    **images,
    **changes,
  }
  return made.generate("a red ball rolls", **arguments)


@pytest.fixture(scope="module")
def expected():
  """Returns the latents of a model in memory, computed once."""
  made = {}

  def get(name):
    if name not in made:
      clip = published.model("clip_vision")[1:]
      space = (
        spaces.DCAEVLatents(*published.model("dc_ae_v")[1:])
        if name.startswith("dc")
        else spaces.WanVAELatents(*published.model("wan_vae")[1:])
      )
      parts = loading.Parts(
        loading.LoadedModel(*published.model("wan_dit", name)[1:]),
        space,
        loading.Texts(
          loading.tokenize.Tokenizer.from_directory(
            published.TINY / "tokenizer"
          ),
          loading.LoadedModel(*published.model("umt5")[1:]),
        ),
        None if name.endswith("t2v") else loading.LoadedModel(*clip),
        loading.flow.from_config(published.SCHEDULER),
      )
      made[name] = np.asarray(sample(parts, name).latents)
    return made[name]

  return get


@pytest.mark.parametrize(
  ("layout", "name"),
  [
    pytest.param(
      layout,
      name,
      marks=[] if layout in ("elsewhere", "diffusers") else pytest.mark.parity,
    )
    for layout, names in published.LAYOUTS.items()
    for name in names
  ],
)
def test_every_layout_gives_the_same(tmp_path, layout, name, expected):
  more = published.write(tmp_path / "model", layout, name)
  parts = load(tmp_path / "model", name, **more)
  assert parts.task == ("t2v" if name.endswith("t2v") else "i2v")
  if layout == "original":  # It has no scheduler: Wan's defaults hold.
    shift = 16.0 if name == "wan_flf2v" else 5.0
    assert (parts.options.shift, parts.options.grid) == (shift, "wan")
    parts = parts._replace(
      options=loading.flow.from_config(published.SCHEDULER)
    )
  assert (parts.options.shift, parts.options.grid) == (3.0, "diffusers_0_36")
  found = sample(parts, name)
  np.testing.assert_array_equal(found.latents, expected(name))


@pytest.mark.parametrize(
  ("task", "dtype"), [("t2v", None), ("t2v", jnp.bfloat16), ("i2v", None)]
)
def test_the_shipped_family(task, dtype):
  parts = loading.load(published.TINY, task=task, dtype=dtype)
  assert parts.transformer.module.dtype == (dtype or jnp.float32)
  module = parts.transformer.module
  assert (module.layers, module.width, module.heads) == (6, 192, 6)
  assert module.patch == (1, 1, 1) and parts.space.channels == 64
  assert parts.texts.tokenizer.vocab == parts.texts.encoder.module.vocab
  size = {"height": 30, "width": 32, "frames": 7}
  found = sample(parts, f"dc_{task}", **size)
  assert found.latents.shape == (1, 2, 1, 1, 64)
  assert np.isfinite(found.latents).all() and np.std(found.latents) > 0.1


def test_the_shipped_family_is_small():
  folders = published.TINY, published.TINY.parent / "dc_ae_v_tiny"
  files = [x for folder in folders for x in folder.rglob("*") if x.is_file()]
  assert sum(path.stat().st_size for path in files) < 25e6


def test_shipped_tokenizer_covers_everything():
  tokenizer = loading.tokenize.Tokenizer.from_directory(
    published.TINY / "tokenizer"
  )
  texts = ["a red ball rolls.", "Zxq 97%?", "静态 é", ""]
  ids, mask = tokenizer(texts, length=24)
  assert ids.max() < 1024 and not (ids == 3).any()  # An unknown piece.
  lengths = mask.sum(1)
  assert list(lengths) == [6, 10, 11, 1]
  assert [row[n - 1] for row, n in zip(ids, lengths, strict=True)] == [1] * 4


# --- what does not fit -------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
  """A directory to copy and damage."""
  directory = tmp_path_factory.mktemp("published") / "wan"
  published.write(directory, "diffusers", "wan_t2v")
  return directory


@pytest.fixture
def damaged(wan, tmp_path):
  return shutil.copytree(wan, tmp_path / "damaged")


def refused(source, name="wan_t2v", **options):
  with pytest.raises(errors.UserError) as caught:
    pipeline.DCVideoGen(load(source, name, **options))
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_all_that_is_missing_is_named(tmp_path):
  found = refused(tmp_path, "wan_i2v")
  for part in (
    "transformer (none of transformer_i2v, transformer,",
    "text_encoder (none of text_encoder, models_t5_*.pth, umt5*.gguf)",
    "tokenizer",
    "autoencoder (none of dc-ae-v*.pt,",
    "image_encoder (none of",
    "no image_encoder was given",
  ):
    assert part in found, found
  assert "image_encoder" not in refused(tmp_path, "wan_t2v")


def test_wrong_task(damaged):
  assert "image_encoder" in refused(damaged, "wan_i2v")
  clip = damaged / "image_encoder"
  published.save(clip, published.model("clip_vision"), "transformers")
  found = refused(damaged, "wan_i2v")
  assert "transformer is for t2v, not i2v" in found
  with pytest.raises(errors.UserError, match="task must be one of t2v, i2v"):
    loading.load(damaged, task="v2v")


def test_autoencoder_of_other_channels(damaged):
  found = refused(damaged, autoencoder=published.ASSETS / "dc_ae_v_tiny")
  assert "autoencoder has 64 channels" in found


def test_autoencoder_from_another_pipeline(damaged):
  """The error shows which autoencoder was taken."""
  for path in (damaged, damaged / "vae"):
    with pytest.raises(errors.UserError, match="autoencoder has 4 channels"):
      load(published.TINY, "dc_t2v", autoencoder=path)
  with pytest.raises(errors.UserError, match="autoencoder has 64 channels"):
    load(damaged, "wan_t2v", autoencoder=published.TINY)


def test_tokenizer_with_more_tokens_than_the_encoder(damaged):
  path = damaged / "tokenizer" / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  tokenizer["model"]["vocab"] += [["zebra", -9.0], ["quagga", -9.0]]
  path.write_text(json.dumps(tokenizer))
  found = refused(damaged)
  assert "has 1026 tokens, more than the 1024 of" in found


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[1]",
    '{"_class_name": "PNDM"}',
    '{"_class_name": ["FlowMatchEulerDiscreteScheduler"]}',
    '{"_class_name": "UniPCMultistepScheduler"}',
    '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "4"}',
    "[" * 100_000,
  ],
)
def test_damaged_scheduler(damaged, text):
  path = damaged / "scheduler" / "scheduler_config.json"
  path.write_text(text)
  assert str(path) in refused(damaged)


def test_missing_shard(damaged):
  shard = sorted((damaged / "transformer").glob("*00002-of*.safetensors"))[0]
  shard.unlink()
  assert "of which 1 are missing" in refused(damaged)


def test_models_are_loaded_by_what_is_given(wan):
  seen = {}

  def counting(kind, source, **options):
    seen[kind] = options["dtype"]
    return convert.load(kind, source, **options)

  loading.load(wan, dtype=jnp.bfloat16, load_model=counting)
  half = jnp.bfloat16
  assert seen == {"wan_dit": half, "umt5": half, "wan_vae": jnp.float32}
