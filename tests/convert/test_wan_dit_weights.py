"""Wan's transformer in every layout, both ways, and its configurations."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import convert, errors, sharding, tree
from dcvideogen_jax.convert import matching, sources, wan_dit
from dcvideogen_jax.models import wan_dit as model
from tests import golden_data
from tests.convert import checkpoints

LAYOUTS = ("diffusers", "original")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_every_layout_and_back_bit_for_bit(name, layout):
  expected = checkpoints.random_weights(name, layout)
  module, variables = convert.load(
    "wan_dit", expected, checkpoints.MODELS[name]
  )
  found = convert.to_torch("wan_dit", module, variables, layout)
  checkpoints.assert_same(found, expected)
  (other,) = set(LAYOUTS) - {layout}
  there = convert.to_torch("wan_dit", module, variables, other)
  assert there.keys() != expected.keys()
  again = convert.load("wan_dit", there, checkpoints.MODELS[name])
  back = convert.to_torch("wan_dit", *again, layout)
  checkpoints.assert_same(back, expected)
  # This project's own names and layout.
  own = tree.flatten(variables["params"])
  again = convert.load("wan_dit", own, checkpoints.MODELS[name])
  checkpoints.assert_same(convert.to_torch("wan_dit", *again, layout), expected)


def test_names_of_both_layouts_mean_the_same():
  """Against `convert_wan_to_diffusers.py` of diffusers, commit 58eb52c."""
  path = golden_data.GOLDEN / "wan_dit" / "names.json"
  patterns = json.loads(path.read_text())["patterns"]
  rules = {
    layout: {
      rule.jax: rule.torch for rule in convert.KINDS["wan_dit"].layouts[layout]
    }
    for layout in LAYOUTS
  }
  found = {
    rules["original"][jax]: name for jax, name in rules["diffusers"].items()
  }
  positions = "img_emb.emb_pos"
  assert found.pop(positions).endswith("image_embedder.pos_embed")
  # Kernels in eight bits, a form of this library, have scales beside them.
  scales = [name for name in found if name.endswith("_scale")]
  assert scales
  for name in scales:
    kernel = name.removesuffix("_scale")
    assert found.pop(name) == f"{found[kernel]}_scale"
  assert found == patterns


@pytest.mark.parametrize("name", ["t2v_wan", "i2v_dc"])
def test_golden_state_dict_and_config(name):
  expected = golden_data.weights("wan_dit", name)
  path = golden_data.GOLDEN / "wan_dit" / f"{name}.json"
  config = json.loads(path.read_text())["config"]
  config["_class_name"] = "WanTransformer3DModel"
  loaded = convert.load("wan_dit", expected, config)
  checkpoints.assert_same(convert.to_torch("wan_dit", *loaded), expected)


@pytest.mark.parametrize(
  "prefix", ["0.", "model.diffusion_model.", "module.", "module._orig_mod."]
)
def test_prefixes(prefix):
  expected = checkpoints.random_weights(layout="original")
  prefixed = {prefix + name: x for name, x in expected.items()}
  loaded = convert.load("wan_dit", prefixed, checkpoints.MODELS["t2v"])
  checkpoints.assert_same(
    convert.to_torch("wan_dit", *loaded, "original"), expected
  )


def test_tables_of_rotary_angles_are_no_weights():
  expected = checkpoints.random_weights()
  tensors = expected | {
    "rope.freqs_cos": np.ones(3, np.float32),
    "freqs": np.ones((4, 4), np.float32),
  }
  loaded = convert.load("wan_dit", tensors, checkpoints.MODELS["t2v"])
  checkpoints.assert_same(convert.to_torch("wan_dit", *loaded), expected)


def test_every_parameter_keeps_its_stored_dtype():
  expected = checkpoints.mixed_dtypes()
  module, variables = convert.load(
    "wan_dit", expected, checkpoints.MODELS["t2v"]
  )
  assert module.param_dtype == jnp.bfloat16 and module.dtype == jnp.float32
  found = convert.to_torch("wan_dit", module, variables)
  checkpoints.assert_same(found, expected)


def test_a_given_dtype_spares_what_the_model_keeps_in_float32():
  module, variables = convert.load(
    "wan_dit",
    checkpoints.random_weights(),
    checkpoints.MODELS["t2v"],
    jnp.bfloat16,
  )
  dtypes = {n: x.dtype for n, x in tree.flatten(variables["params"]).items()}
  assert dtypes["blocks/self_attn/q/kernel"] == jnp.bfloat16
  assert dtypes["blocks/modulation"] == jnp.float32
  assert dtypes["time_embed/linear_1/kernel"] == jnp.float32
  expected = matching.parameters("wan_dit", module)
  assert dtypes == {n: x.dtype for n, x in tree.flatten(expected).items()}


@pytest.mark.parametrize(
  "dtype", [np.float64, np.float16, ml_dtypes.float8_e4m3fn]
)
def test_other_dtypes(dtype):
  stored = {n: x.astype(dtype) for n, x in checkpoints.random_weights().items()}
  _, variables = convert.load("wan_dit", stored, checkpoints.MODELS["t2v"])
  (found,) = {x.dtype for x in jax.tree.leaves(variables)}
  kept = {"float64": np.float32, "float8_e4m3fn": jnp.bfloat16}
  assert found == kept.get(np.dtype(dtype).name, dtype)
  np.testing.assert_array_equal(
    variables["params"]["head"]["bias"], stored["proj_out.bias"].astype(found)
  )


# --- configurations ----------------------------------------------------------


@pytest.mark.parametrize("name", model.VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_json_both_ways(name, layout):
  module = model.build(model.VARIANTS[name])
  fields = convert.config_of(module)
  written = json.loads(json.dumps(wan_dit.CONFIGS[layout](fields)))
  assert model.build(wan_dit.config_from(written)) == module


def test_released_config_files():
  """Configs of Wan-AI/Wan2.1-T2V-1.3B and Wan2.1-I2V-14B-480P-Diffusers."""
  original = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
  }
  diffusers = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": 5120,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": 1280,
    "in_channels": 36,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
  }
  for config, name in (
    (original, "wan2.1-t2v-1.3b"),
    (diffusers, "wan2.1-i2v-14b"),
  ):
    found = model.build(wan_dit.config_from(config))
    assert found == model.build(model.VARIANTS[name])


@pytest.mark.parametrize(
  ("layout", "change", "message"),
  [
    ("diffusers", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', expec"),
    ("diffusers", {"cross_attn_norm": False}, "cross_attn_norm is False"),
    (
      "diffusers",
      {"num_layers": None},
      "layers is None, expected a positive whole number",
    ),
    (
      "original",
      {"model_type": "vace"},
      "model_type is 'vace', expected 't2v'",
    ),
    ("original", {"window_size": [4, 4]}, r"window_size is \[4, 4\]"),
    ("original", {"dim": "wide"}, "width is 'wide', expected a positive whole"),
  ],
)
def test_models_that_are_not_this_one(layout, change, message):
  fields = convert.config_of(model.build(checkpoints.MODELS["t2v"]))
  config = wan_dit.CONFIGS[layout](fields) | change
  with pytest.raises(errors.UserError, match=message):
    convert.load("wan_dit", checkpoints.random_weights(), config)


def test_an_incomplete_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
  checkpoints.write_sharded(tmp_path, checkpoints.random_weights(), 1)
  with pytest.raises(errors.UserError, match="of a WanModel is incomplete"):
    convert.load("wan_dit", tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", model.VARIANTS)
def test_released_models_are_recognised_by_their_shapes(name, layout):
  tensors = {
    n: sources.Tensor(shape, np.dtype(np.float32), lambda: None)
    for n, shape in checkpoints.shapes(
      "wan_dit", model.VARIANTS[name], layout
    ).items()
  }
  found = matching.find_config("wan_dit", {}, None, tensors)
  assert model.build(found) == model.build(model.VARIANTS[name])


def test_heads_of_other_widths_need_a_config():
  weights = checkpoints.state_dict("wan_dit", checkpoints.INFERRED, "diffusers")
  module, _ = convert.load("wan_dit", weights)
  assert module == model.build(checkpoints.INFERRED)
  with pytest.raises(errors.UserError, match="so a config is needed"):
    convert.load("wan_dit", checkpoints.random_weights())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_models_beside_do_not_matter(tmp_path, layout):
  """Weights, config.json and another model's .pth in one directory."""
  expected = checkpoints.random_weights(layout=layout)
  checkpoints.write_sharded(tmp_path, expected, 2)
  fields = convert.config_of(model.build(checkpoints.MODELS["t2v"]))
  config = wan_dit.CONFIGS[layout](fields)
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"not read")
  extra = {"x": np.ones(1, np.float32)}
  safetensors.numpy.save_file(extra, tmp_path / "upsampler.safetensors")
  index = next(tmp_path.glob("*.index.json"))
  for source in (tmp_path, index):
    loaded = convert.load("wan_dit", source)
    assert loaded[0] == model.build(checkpoints.MODELS["t2v"])
    checkpoints.assert_same(
      convert.to_torch("wan_dit", *loaded, layout), expected
    )


def test_layers_that_are_missing_are_named():
  weights = checkpoints.random_weights(layout="original")
  weights = {n: x for n, x in weights.items() if not n.startswith("blocks.1.")}
  with pytest.raises(errors.UserError) as e:
    convert.load("wan_dit", weights, checkpoints.MODELS["t2v"])
  assert "wan_dit in original names does not fit (27 differences)" in str(
    e.value
  )
  assert "missing blocks.1.self_attn.q.weight (16, 16)" in str(e.value)


# --- onto devices, in part ---------------------------------------------------


@pytest.mark.parametrize("way", ["function", "tree", "one"])
def test_straight_to_shardings(tmp_path, way):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  rules = [("params/.*", "fsdp")]
  expected = checkpoints.mixed_dtypes()
  checkpoints.write_sharded(tmp_path, expected, 2)
  module = model.build(checkpoints.MODELS["t2v"])
  abstract = {"params": matching.parameters("wan_dit", module)}
  target = {
    "function": functools.partial(sharding.shardings, mesh=mesh, rules=rules),
    "tree": sharding.shardings(abstract, mesh, rules),
    "one": jax.sharding.NamedSharding(mesh, P()),
  }[way]
  module, variables = convert.load(
    "wan_dit", tmp_path, checkpoints.MODELS["t2v"], sharding=target
  )
  kernel = variables["params"]["blocks"]["ffn"]["linear_1"]["kernel"]
  spec = P() if way == "one" else P(None, None, "fsdp")
  assert kernel.sharding.spec == spec
  found = convert.to_torch("wan_dit", module, variables)
  checkpoints.assert_same(found, expected)


def test_a_sharding_for_every_parameter():
  mesh = sharding.make_mesh({"data": 8})
  given = {"params": {"head": {"bias": jax.NamedSharding(mesh, P())}}}
  with pytest.raises(errors.UserError, match="no sharding is given for blocks"):
    convert.load(
      "wan_dit",
      checkpoints.random_weights(),
      checkpoints.MODELS["t2v"],
      sharding=given,
    )


@pytest.mark.parametrize("prefix", ["", "0."])
def test_the_file_of_the_first_phase(prefix):
  weights = checkpoints.random_weights("i2v", "original")
  part = {
    prefix + name: x
    for name, x in weights.items()
    if name.startswith("patch_embedding")
  }
  module = model.build(checkpoints.MODELS["i2v"])
  found = convert.load_part("wan_dit", part, module)
  assert tree.names(found) == ["patch_embed/bias", "patch_embed/kernel"]
  np.testing.assert_array_equal(
    found["patch_embed"]["kernel"],
    weights["patch_embedding.weight"].transpose(2, 3, 4, 1, 0),
  )
  part[prefix + "other"] = np.ones(2, np.float32)
  with pytest.raises(errors.UserError, match=r"unexpected other \(2,\)"):
    convert.load_part("wan_dit", part, module)


def test_a_part_has_all_layers_or_none():
  weights = checkpoints.random_weights()
  names = [f"blocks.{i}.ffn.net.2.bias" for i in range(3)]
  module = model.build(checkpoints.MODELS["t2v"])
  part = {name: weights[name] for name in names[:2]}
  with pytest.raises(errors.UserError, match=r"missing blocks\.2\.ffn"):
    convert.load_part("wan_dit", part, module)
  with pytest.raises(errors.UserError, match="holds no parameter"):
    convert.load_part("wan_dit", {"x": np.ones(2, np.float32)}, module)
