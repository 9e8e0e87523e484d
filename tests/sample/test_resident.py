"""What sampling does not need is not loaded, or goes before the rest comes."""

import jax
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import eight_bits
from dcvideogen_jax.sample import loading, pipeline
from tests.sample import published


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model") / "model"
  published.write(directory, "elsewhere", "dc_t2v")
  return directory


def load(model, **options):
  return loading.load(model, load_model=published.load, **options)


def test_the_encoder_of_dc_ae_v_comes_when_a_video_is_encoded(model):
  space = load(model, text_encoder=None).space
  assert space.variables["params"].keys() == {"decoder"}
  exact = spaces.DCAEVLatents(*published.model("dc_ae_v")[1:])
  latents = np.random.default_rng(0).normal(size=(1, 2, 2, 3, 4))
  latents = latents.astype(np.float32)
  for found, expected in zip(
    *(x.decode(latents, (8, 8, 12), np.float32, 2**30) for x in (space, exact)),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)
  assert space.variables["params"].keys() == {"decoder"}
  video = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 12, 3), np.uint8)
  found, expected = (
    x.encode([video], (8, 8, 12), 2**30) for x in (space, exact)
  )
  np.testing.assert_array_equal(found, expected)
  assert space.variables["params"].keys() == {"decoder", "encoder"}


def test_the_text_encoder_goes_before_the_others_come(model):
  order, kept = [], []

  def watched(kind, source, **options):
    order.append(kind)
    if kept:
      assert all(x.is_deleted() for x in jax.tree.leaves(kept))
    module, variables = published.load(kind, source, **options)
    if kind == "umt5":
      kept.append(variables)
    return module, variables

  made = pipeline.DCVideoGen.from_pretrained(
    model, embed=["a cat"], load_model=watched
  )
  assert order == ["umt5", "wan_dit", "dc_ae_v"]
  usual = pipeline.DCVideoGen(load(model))
  for text in ("a cat", made.negative_prompt()):
    np.testing.assert_array_equal(made.embed([text]), usual.embed([text]))
  with pytest.raises(errors.UserError, match="no text encoder for 'a dog'"):
    made.embed(["a dog"])


def test_the_text_encoder_may_be_on_the_host_or_absent(model):
  made = pipeline.DCVideoGen(load(model, text_encoder="host"))
  assert made.parts.texts.on_host
  usual = pipeline.DCVideoGen(load(model))
  np.testing.assert_array_equal(made.embed(["a cat"]), usual.embed(["a cat"]))
  assert load(model, text_encoder=None).texts is None
  with pytest.raises(errors.UserError, match="text_encoder must be one of dev"):
    load(model, text_encoder="disk")


def test_the_image_encoders_go_before_the_others_come(tmp_path):
  directory = tmp_path / "model"
  published.write(directory, "elsewhere", "dc_i2v")
  asked, order, gone = {"frames": 8, "height": 8, "width": 12}, [], []

  def watched(kind, source, **options):
    order.append(kind)
    module, variables = published.load(kind, source, **options)
    if len(order) > 3:
      assert gone and all(x.is_deleted() for x in gone)
    else:
      gone.extend(jax.tree.leaves(variables))
    return module, variables

  first, other = np.random.default_rng(0).integers(
    0, 256, (2, 8, 12, 3), np.uint8
  )
  made = pipeline.DCVideoGen.from_pretrained(
    directory,
    task="i2v",
    encode=[{"image": first, "steps": 3, **asked}],
    load_model=watched,
  )
  assert order == [
    *("wan_dit", "dc_ae_v", "clip_vision"),
    *("wan_dit", "dc_ae_v", "umt5"),
  ]
  assert made.parts.image_encoder is None
  assert made.parts.space.variables["params"].keys() == {"decoder"}
  usual = pipeline.DCVideoGen(load(directory, task="i2v"))
  for seed in (0, 1):
    found, expected = (
      x.generate("a cat", image=first, steps=2, seed=seed, **asked).video()
      for x in (made, usual)
    )
    np.testing.assert_array_equal(found, expected)
  with pytest.raises(errors.UserError, match="was not encoded beforehand"):
    made.generate("a cat", image=other, steps=2, **asked)
  with pytest.raises(errors.UserError, match="it takes no image"):
    pipeline.DCVideoGen.from_pretrained(directory, task="t2v", encode=[])


def test_what_changes_the_transformer_comes_before_rounding(model):
  _, module, variables = published.model("wan_dit", "dc_t2v")

  def change(transformer):
    assert transformer.module.weights is None
    doubled = jax.tree.map(lambda x: 2 * x, transformer.variables)
    return transformer._replace(variables=doubled)

  parts = load(model, weights="int8", change=change)
  assert parts.transformer.module.weights == "int8"
  assert parts.texts.encoder.module.weights == "int8"
  _, expected = convert.in_eight_bits(
    "wan_dit", *change(loading.LoadedModel(module, variables)), "int8"
  )
  expected = tree.flatten(expected)
  found = tree.flatten(parts.transformer.variables)
  assert found.keys() == expected.keys()
  for name, leaf in found.items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
  plain = load(model, weights="bfloat16", change=change).transformer
  assert plain.module.weights is None
  assert not any(
    eight_bits.is_stored(x.dtype) for x in jax.tree.leaves(plain.variables)
  )


def test_unknown_weights_are_refused(model):
  with pytest.raises(errors.UserError, match="weights must be one of int8, fl"):
    load(model, weights="int4")
