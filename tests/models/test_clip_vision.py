"""CLIP's vision tower against transformers 5.23 and Wan 2.1 commit 9737cba."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import clip_vision as table
from dcvideogen_jax.models import clip_vision
from tests import golden_data, random_weights

FEATURES = 2e-5  # max abs

# For each layout, the prefix of its names in the golden file and in real files.
PREFIXES = {
  "transformers": ("hf.", "vision_model."),
  "transformers5": ("hf.", ""),
  "original": ("official.", "visual."),
}


def config():
  path = golden_data.GOLDEN / "clip_vision" / "clip_tiny.json"
  config = json.loads(path.read_text())["hf_config"]
  return config | {"model_type": "clip_vision_model"}


def state_dict(layout):
  """Returns the weights with the names and extra tensors of published files."""
  here, there = PREFIXES[layout]
  weights = {
    there + name.removeprefix(here): x
    for name, x in golden_data.weights("clip_vision", "clip_tiny").items()
    if name.startswith(here)
  }
  rng = np.random.default_rng(0)
  if layout == "original":
    weights["log_scale"] = np.float32(2.66)
    weights["textual.head.0.weight"] = rng.normal(size=(4, 6))
  if layout == "transformers":
    weights["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    weights["visual_projection.weight"] = rng.normal(size=(4, 6))
  return weights


@functools.cache
def load(layout="transformers"):
  return convert.load("clip_vision", state_dict(layout), config())


def images():
  golden = golden_data.io("clip_vision", "clip_tiny")
  return np.moveaxis(golden["in.b2.pixel_values"], 1, -1)


@pytest.mark.parametrize("layout", [*table.LAYOUTS])
def test_features_equal_the_reference(layout):
  golden = golden_data.io("clip_vision", "clip_tiny")
  module, variables = load(layout)
  features = random_weights.jitted(module)(variables, images())
  for name in ("official_features", "hf_hidden_states_minus2"):
    expected = golden[f"out.b2.{name}"]
    np.testing.assert_allclose(features, expected, rtol=0, atol=FEATURES)


def test_intermediates_equal_the_reference():
  golden = golden_data.io("clip_vision", "clip_tiny")
  module, variables = load()
  apply = random_weights.jitted(module, mutable="intermediates")
  _, state = apply(variables, images())
  state = state["intermediates"]
  found = {
    "hf_hidden_states.0": state["embedded"][0],
    "hf_hidden_states.1": state["blocks"]["hidden"][0][0],
    "hf_last_hidden_state": state["last"][0],
    "hf_pooler_output": state["pooled"][0],
  }
  for name, x in found.items():
    expected = golden[f"out.b2.{name}"]
    np.testing.assert_allclose(x, expected, rtol=0, atol=FEATURES, err_msg=name)


def test_last_block_and_norm_have_no_influence():
  module, variables = load()
  params = jax.tree.map(np.array, variables["params"])
  for leaf in jax.tree.leaves(params["blocks"]):
    leaf[-1] += 1
  params["post_norm"]["scale"] += 1
  features = random_weights.jitted(module)(variables, images())
  again = random_weights.jitted(module)({"params": params}, images())
  np.testing.assert_array_equal(features, again)


@pytest.mark.parametrize("layout", [*table.LAYOUTS])
def test_every_layout_round_trips(layout):
  module, variables = load(layout)
  found = convert.to_torch("clip_vision", module, variables, layout)
  weights = {
    name: x
    for name, x in state_dict(layout).items()
    if not any(re.fullmatch(pattern, name) for pattern in table.IGNORED)
  }
  assert found.keys() == weights.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(found[name], x)
  jax.tree.map(np.testing.assert_array_equal, variables, load("original")[1])


def test_a_missing_third_of_qkv_is_told():
  weights = state_dict("transformers5")
  del weights["encoder.layers.1.self_attn.k_proj.weight"]
  with pytest.raises(errors.UserError, match=r"missing .*1\.self_attn\.k_proj"):
    convert.load("clip_vision", weights, config())


def test_remat_changes_no_gradient():
  def gradient(remat):
    module, variables = load()
    module = module.clone(remat=remat)

    def loss(variables):
      return jnp.sum(module.apply(variables, images()[:1]) ** 3)

    assert ("remat" in str(jax.make_jaxpr(loss)(variables))) == remat
    return jax.jit(jax.grad(loss))(variables)["params"]

  plain, again = gradient(False), gradient(True)
  assert np.any(plain["blocks"]["attn"]["qkv"]["kernel"])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
    plain,
    again,
  )


def test_bfloat16_stays_near_float32():
  module, variables = load()
  features = random_weights.jitted(module)(variables, images())
  module = module.clone(dtype=jnp.bfloat16)
  rounded = jax.jit(module.apply)(variables, images())
  assert rounded.dtype == jnp.bfloat16
  error = np.abs(rounded.astype(np.float32) - features).max()
  assert 1e-3 < error < 0.05


def test_images_of_another_size_are_refused():
  module, variables = load()
  with pytest.raises(ValueError, match="56 pixels square"):
    module.apply(variables, images()[:, :42])


def test_vit_h_has_the_released_size():
  module = clip_vision.build(clip_vision.VARIANTS["vit_h_14"])
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  features, variables = jax.eval_shape(
    module.init_with_output, jax.random.key(0), image
  )
  leaves = jax.tree.leaves(variables["params"])
  assert sum(leaf.size for leaf in leaves) == 630_766_080
  assert features.shape == (1, 257, 1280)


def test_config_json_goes_both_ways():
  fields = clip_vision.VARIANTS["vit_h_14"]
  tower = table.config_to(fields)
  whole = {"model_type": "clip", "vision_config": tower}
  for json_config in (tower, whole):
    found = clip_vision.build(table.config_from(json_config))
    assert found == clip_vision.build(fields)
  assert table.config_from({"model_type": "siglip_vision_model"}) is None
  with pytest.raises(errors.UserError, match="quick_gelu"):
    table.config_from(tower | {"hidden_act": "quick_gelu"})


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"heads": 0}, "heads is 0"),
    ({"heads": 7}, "1280 is no multiple of heads 7"),
    ({"patch": 15}, "224 is no multiple of patch 15"),
    ({"lenght": 3}, "lenght"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises((TypeError, ValueError), match=message):
    clip_vision.build(clip_vision.VARIANTS["vit_h_14"], **fields)


@pytest.mark.parity
def test_equals_the_installed_transformers(tmp_path):
  """Its files load with the same output, and it opens this project's files."""
  import torch
  import transformers

  torch.manual_seed(1)
  reference = transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(
      hidden_size=24,
      intermediate_size=40,
      num_hidden_layers=2,
      num_attention_heads=3,
      image_size=28,
      patch_size=7,
      hidden_act="gelu",
    )
  ).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.2)
  image = np.random.default_rng(2).normal(size=(2, 28, 28, 3))
  image = image.astype(np.float32)
  with torch.no_grad():
    expected = reference(
      torch.from_numpy(image).permute(0, 3, 1, 2), output_hidden_states=True
    ).hidden_states[-2]
  reference.save_pretrained(tmp_path / "theirs")

  module, variables = convert.load("clip_vision", tmp_path / "theirs")
  features = jax.jit(module.apply)(variables, image)
  np.testing.assert_allclose(features, expected, rtol=0, atol=FEATURES)

  convert.save(
    tmp_path / "ours", "clip_vision", module, variables, layout="transformers"
  )
  opened, report = transformers.CLIPVisionModel.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  for name, x in opened.state_dict().items():
    assert torch.equal(x, reference.state_dict()[name]), name
