"""Low-rank updates in every spelling are found, scaled and merged."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors, sharding, tree
from tests import random_weights
from tests.convert import checkpoints, lora_files


@pytest.mark.parametrize(
  "alphas", [lora_files.RANKS, None], ids=["alpha", "no_alpha"]
)
@pytest.mark.parametrize("spelling", lora_files.SPELLINGS)
def test_every_spelling_is_merged_right(base, spelling, alphas):
  found = lora_files.factors()
  tensors = lora_files.spelt(spelling, found, alphas)
  lora = convert.load_lora("wan_dit", tensors, base[0], scale=0.7)
  assert lora.matched == len(tensors)
  assert lora.rank == 4
  params = convert.merge(base[1]["params"], lora)
  lora_files.assert_merged(
    params, base, lora_files.merged_by_hand(found, alphas, 0.7)
  )
  # The parameters that were given are unchanged.
  lora_files.assert_merged(base[1]["params"], base, lora_files.weights())


def test_a_convolution(base):
  found = lora_files.factors({"patch_embedding": (2, 1.0)})
  lora = convert.load_lora("wan_dit", lora_files.spelt("comfy", found), base[0])
  params = convert.merge(base[1]["params"], lora)
  lora_files.assert_merged(params, base, lora_files.merged_by_hand(found))


def test_parts_of_a_fused_kernel():
  """CLIP's q, k and v are one parameter here; each has its own rank."""
  fields = {
    "image_size": 8,
    "patch": 4,
    "layers": 2,
    "width": 8,
    "heads": 2,
    "ffn_width": 12,
  }
  state = checkpoints.state_dict("clip_vision", fields, "transformers")
  module, variables = convert.load("clip_vision", state, fields)
  random = np.random.default_rng(0)
  tensors = {}
  for layer, part, rank in ((0, "q", 2), (0, "v", 3), (1, "k", 1)):
    name = f"vision_model.encoder.layers.{layer}.self_attn.{part}_proj"
    a, b = (random.normal(size=s) for s in ((rank, 8), (8, rank)))
    tensors[f"base_model.model.{name}.lora_A.weight"] = a
    tensors[f"base_model.model.{name}.lora_B.weight"] = b
    state[f"{name}.weight"] = state[f"{name}.weight"] + b @ a
  lora = convert.load_lora("clip_vision", tensors, module)
  params = convert.merge(variables["params"], lora)
  found = convert.to_torch("clip_vision", module, {"params": params})
  for name, x in state.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


def test_several_add_up(base):
  one, two = lora_files.factors(), lora_files.factors(seed=2)
  loras = [
    convert.load_lora("wan_dit", lora_files.spelt("kohya", one), base[0], 0.5),
    convert.load_lora(
      "wan_dit", lora_files.spelt("diffusers", two), base[0], -2.0
    ),
  ]
  params = convert.merge(base[1]["params"], convert.add(loras))
  expected = lora_files.merged_by_hand(one, scale=0.5)
  for name, x in lora_files.merged_by_hand(two, scale=-2.0).items():
    expected[name] = expected[name] + x - lora_files.weights()[name]
  lora_files.assert_merged(params, base, expected)


def test_differences_of_extracted_files(base):
  """Norms, biases, modulations and whole weights, which have no alpha."""
  random = np.random.default_rng(3)
  shapes = checkpoints.shapes("wan_dit", lora_files.FIELDS, "original")
  names = {
    "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "blocks.2.norm3.diff": "blocks.2.norm3.weight",
    "blocks.2.norm3.diff_b": "blocks.2.norm3.bias",
    "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "blocks.1.diff_m": "blocks.1.modulation",
    "head.diff_m": "head.modulation",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "head.head.diff": "head.head.weight",
    "blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
    "blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
  }
  deltas = {
    name: random.normal(size=shapes[target]).astype(np.float32)
    for name, target in names.items()
  }
  found = lora_files.factors()
  tensors = lora_files.spelt("comfy", found, lora_files.RANKS) | {
    f"diffusion_model.{name}": x for name, x in deltas.items()
  }
  lora = convert.load_lora("wan_dit", tensors, base[0], 0.5)
  expected = lora_files.merged_by_hand(found, lora_files.RANKS, 0.5)
  for name, target in names.items():
    expected[target] = expected[target] + 0.5 * deltas[name]
  params = convert.merge(base[1]["params"], lora)
  lora_files.assert_merged(params, base, expected)
  with pytest.raises(errors.UserError, match="kept apart: .*blocks/modulation"):
    convert.with_lora("wan_dit", base[0], lora)


def test_merged_in_float32_then_cast():
  half = np.dtype(jnp.bfloat16)
  loaded = convert.load(
    "wan_dit", lora_files.weights(dtype=half), lora_files.FIELDS
  )
  found = lora_files.factors()
  lora = convert.load_lora(
    "wan_dit", lora_files.spelt("peft", found), loaded[0]
  )
  params = convert.merge(loaded[1]["params"], lora)
  state = lora_files.merged_by_hand(found, dtype=half)
  found = convert.to_torch("wan_dit", loaded[0], {"params": params}, "original")
  wrong = 0
  for name, x in state.items():
    assert found[name].dtype == half
    # float32 sums rarely fall on the other side of a rounding boundary.
    wrong += (found[name] != x.astype(np.float32).astype(half)).sum()
  assert wrong <= 2


def test_shardings_stay():
  mesh = sharding.make_mesh({"fsdp": 8})
  module, variables = convert.load(
    "wan_dit",
    lora_files.weights(),
    lora_files.FIELDS,
    sharding=lambda x: sharding.shardings(x, mesh, [(".*", "fsdp")]),
  )
  before = {n: x.sharding for n, x in tree.flatten(variables).items()}
  lora = convert.load_lora(
    "wan_dit", lora_files.spelt("peft", lora_files.factors()), module
  )
  params = convert.merge(variables["params"], lora, donate=True)
  after = {n: x.sharding for n, x in tree.flatten({"params": params}).items()}
  assert before == after
  lora_files.assert_merged(
    params, (module,), lora_files.merged_by_hand(lora_files.factors())
  )


def apply(module, variables):
  random = np.random.default_rng(5)
  c, e = module.in_channels, module.text_width
  arguments = [
    random.normal(size=s).astype(np.float32)
    for s in ((2, 2, 4, 4, c), (2,), (2, 3, e))
  ]
  return random_weights.jitted(module)(variables, *arguments)


def test_apart_equals_merged(base):
  ranks = {
    "blocks.0.self_attn.q": (2, 4.0),
    "blocks.2.self_attn.o": (3, 3.0),
    "blocks.1.ffn.2": (5, 2.0),
    "time_projection.1": (2, 1.0),
  }
  tensors = lora_files.spelt("kohya", lora_files.factors(ranks), ranks)
  lora = convert.load_lora("wan_dit", tensors, base[0], 0.6)
  module, variables = convert.with_lora("wan_dit", base[0], lora)
  assert module.lora_rank == 5
  apart = apply(module, base[1] | variables)
  merged = apply(base[0], {"params": convert.merge(base[1]["params"], lora)})
  plain = apply(base[0], base[1])
  np.testing.assert_allclose(apart, merged, atol=1e-5)
  assert np.abs(plain - merged).max() > 0.01


def test_layers_that_cannot_keep_updates_apart(base):
  lora = convert.load_lora(
    "wan_dit", lora_files.spelt("peft", lora_files.factors()), base[0]
  )
  with pytest.raises(errors.UserError, match=r"apart: blocks/cross_attn/o/ker"):
    convert.with_lora("wan_dit", base[0], lora)


# --- where alpha is ----------------------------------------------------------


@pytest.mark.parametrize(
  ("config", "rule"),
  [
    ({"lora_alpha": 6}, lambda m, r: 6),
    ({"lora_alpha": 6, "use_rslora": True}, lambda m, r: 6 * r**0.5),
    (
      {"lora_alpha": 6, "alpha_pattern": {"ffn.0": 1, "blocks.2.*q": 5}},
      lambda m, r: 1 if m.endswith("ffn.0") else 5 if "blocks.2" in m else 6,
    ),
  ],
  ids=["alpha", "rslora", "pattern"],
)
@pytest.mark.parametrize("where", ["file", "directory", "header"])
def test_alpha_of_peft_and_diffusers(base, tmp_path, config, rule, where):
  found = lora_files.factors()
  path = tmp_path / "adapter_model.safetensors"
  metadata = {}
  if where == "header":
    described = {f"transformer.{name}": x for name, x in config.items()}
    metadata["lora_adapter_metadata"] = json.dumps(described)
  else:
    ranks = {module: rank for module, (rank, _) in lora_files.RANKS.items()}
    config = config | {"peft_type": "LORA", "r": 4, "rank_pattern": ranks}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(lora_files.spelt("peft", found), path, metadata)
  source = tmp_path if where == "directory" else path
  lora = convert.load_lora("wan_dit", source, base[0])
  params = convert.merge(base[1]["params"], lora)
  lora_files.assert_merged(
    params,
    base,
    lora_files.merged_by_hand(found, lora_files.alphas(lora_files.RANKS, rule)),
  )


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      {"use_dora": True},
      "has use_dora, but the weights have no base_model.mod",
    ),
    ({"peft_type": "LOHA"}, r"it describes LoHa, and .*ffn\.\d is LoRA"),
    ({"peft_type": "VERA"}, "found peft_type='VERA', which is not read"),
  ],
)
@pytest.mark.filterwarnings("ignore:.*default of 8")
def test_descriptions_of_others_are_refused(base, tmp_path, config, message):
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  path = tmp_path / "adapter_model.safetensors"
  safetensors.numpy.save_file(
    lora_files.spelt("peft", lora_files.factors()), path
  )
  with pytest.raises(errors.UserError, match=message):
    convert.load_lora("wan_dit", path, base[0])


def trainer_file(found):
  """Returns a file as DC-VideoGen's trainer writes it.

  It holds weights and updates together; alpha is twice the rank.
  """
  tensors = {}
  for name, x in lora_files.weights().items():
    module, _, leaf = name.rpartition(".")
    if module in found:
      tensors[f"{module}.base_layer.{leaf}"] = x
    else:
      tensors[name] = x
  for module, (a, b) in found.items():
    tensors[f"{module}.lora_A.default.weight"] = a
    tensors[f"{module}.lora_B.default.weight"] = b
  return tensors


def test_a_trainers_file_is_merged_on_loading(base):
  found = lora_files.factors()
  doubled = lora_files.alphas(lora_files.RANKS, lambda m, rank: 2 * rank)
  tensors = trainer_file(found)
  _, variables = convert.load("wan_dit", tensors, lora_files.FIELDS)
  lora_files.assert_merged(
    variables["params"], base, lora_files.merged_by_hand(found, doubled)
  )
  _, plain = convert.load(
    "wan_dit", tensors, lora_files.FIELDS, merge_lora=False
  )
  lora_files.assert_merged(plain["params"], base, lora_files.weights())
  lora = convert.load_lora("wan_dit", tensors, base[0])
  params = convert.merge(plain["params"], lora)
  lora_files.assert_merged(
    params, base, lora_files.merged_by_hand(found, doubled)
  )
