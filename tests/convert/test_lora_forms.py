"""Forms of adapters against their formulas in float64, and what is skipped."""

import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors, sharding, tree
from tests.convert import checkpoints, lora_files

# One layer of 16 inputs and outputs for each form.
MODULES = [
  f"blocks.{i}.{x}"
  for i in range(3)
  for x in ("self_attn.q", "self_attn.k", "cross_attn.v", "cross_attn.o")
]


def drawn(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lora(seed):
  return {"lora_down.weight": drawn(seed, 3, 16)} | {
    "lora_up.weight": drawn(seed + 1, 16, 3),
    "alpha": np.float32(2),
  }


def product(t):
  return t["lora_up.weight"] @ t["lora_down.weight"] * t["alpha"] / 3


def dora(weight, change, magnitude, axis):
  new = weight + change
  return magnitude * new / np.linalg.norm(new, axis=axis, keepdims=True)


LOKR = {
  "lokr_w1": drawn(1, 4, 2),
  "lokr_w2_a": drawn(2, 4, 2),
  "lokr_w2_b": drawn(3, 2, 8),
  "alpha": np.float32(5),
}
BOTH = {
  "lokr_w1_a": drawn(4, 2, 3),
  "lokr_w1_b": drawn(5, 3, 4),
  "lokr_w2_a": drawn(6, 8, 3),
  "lokr_w2_b": drawn(7, 3, 4),
  "alpha": np.float32(5),
}
WHOLE = {"lokr_w1": drawn(8, 8, 4), "lokr_w2": drawn(9, 2, 4)}
LOHA = {
  "hada_w1_a": drawn(10, 16, 3),
  "hada_w1_b": drawn(11, 3, 16),
  "hada_w2_a": drawn(12, 16, 3),
  "hada_w2_b": drawn(13, 3, 16),
  "alpha": np.float32(2),
}
ROWS, COLUMNS = 1 + abs(drawn(14, 16, 1)), 1 + abs(drawn(15, 1, 16))
# Tensors, and the function from a weight to the changed one.
FORMS = {
  "lokr": (
    LOKR,
    lambda w: (
      w
      + 5 / 2 * np.kron(LOKR["lokr_w1"], LOKR["lokr_w2_a"] @ LOKR["lokr_w2_b"])
    ),
  ),
  "lokr both": (
    BOTH,
    lambda w: (
      w
      + 5
      / 3
      * np.kron(
        BOTH["lokr_w1_a"] @ BOTH["lokr_w1_b"],
        BOTH["lokr_w2_a"] @ BOTH["lokr_w2_b"],
      )
    ),
  ),
  # alpha does not count where both are whole.
  "lokr whole": (
    WHOLE | {"alpha": np.float32(64)},
    lambda w: w + np.kron(WHOLE["lokr_w1"], WHOLE["lokr_w2"]),
  ),
  "loha": (
    LOHA,
    lambda w: (
      w
      + (LOHA["hada_w1_a"] @ LOHA["hada_w1_b"])
      * (LOHA["hada_w2_a"] @ LOHA["hada_w2_b"])
      * 2
      / 3
    ),
  ),
  "dora rows": (
    lora(20) | {"dora_scale": ROWS},
    lambda w: dora(w, product(lora(20)), ROWS, 1),
  ),
  "dora columns": (
    lora(22) | {"dora_scale": COLUMNS},
    lambda w: dora(w, product(lora(22)), COLUMNS, 0),
  ),
  "dora flat": (
    lora(24) | {"dora_scale": ROWS[:, 0]},
    lambda w: dora(w, product(lora(24)), ROWS, 1),
  ),
  "dora of peft": (
    lora(26) | {"lora_magnitude_vector": ROWS[:, 0]},
    lambda w: dora(w, product(lora(26)), ROWS, 1),
  ),
  "dora of old peft": (
    lora(28) | {"lora_magnitude_vector.style.weight": ROWS.T[0]},
    lambda w: dora(w, product(lora(28)), ROWS, 1),
  ),
  "ia3 outputs": (
    {"weight": ROWS[:, 0], "on_input": np.array(0)},
    lambda w: w * (1 + ROWS),
  ),
  "ia3 inputs": (
    {"weight": COLUMNS[0], "on_input": np.array(1)},
    lambda w: w * (1 + COLUMNS),
  ),
  "ia3 of peft": ({"ia3_l": COLUMNS}, lambda w: w * COLUMNS),
}
PREFIXES = {
  "": str,
  "diffusion_model.": str,
  "lora_unet_": lambda name: name.replace(".", "_"),
  "base_model.model.": lora_files.diffusers_name,
  "lycoris_": lambda name: lora_files.diffusers_name(name).replace(".", "_"),
}


def everything(prefix="diffusion_model."):
  """Returns the tensors of all forms, and the weights that they give."""
  expected = {n: x.astype(np.float64) for n, x in lora_files.weights().items()}
  tensors = {}
  for module, (own, change) in zip(MODULES, FORMS.values(), strict=True):
    name = prefix + PREFIXES[prefix](module)
    tensors |= {f"{name}.{end}": x for end, x in own.items()}
    expected[f"{module}.weight"] = change(expected[f"{module}.weight"])
  return tensors, expected


@pytest.mark.parametrize("prefix", PREFIXES)
def test_forms_in_every_spelling(base, prefix):
  tensors, expected = everything(prefix)
  updates = convert.load_lora("wan_dit", tensors, base[0])
  assert updates.matched == len(tensors) and updates.rank == 3
  assert updates.changed == {
    f"blocks/{x}/kernel"
    for x in ("self_attn/q", "self_attn/k", "cross_attn/v", "cross_attn/o")
  }
  params = convert.merge(base[1]["params"], updates)
  lora_files.assert_merged(params, base, expected, atol=1e-5)
  lora_files.assert_merged(base[1]["params"], base, lora_files.weights())


def test_what_changes_is_scaled(base):
  tensors, expected = everything()
  params = base[1]["params"]
  for scale in (0.0, -0.5):
    updates = convert.load_lora("wan_dit", tensors, base[0], scale)
    changed = {
      n: x + scale * (expected[n] - x) for n, x in lora_files.weights().items()
    }
    lora_files.assert_merged(
      convert.merge(params, updates), base, changed, atol=1e-5
    )


def test_several_do_not_depend_on_their_order(base):
  """Each change is that of the weight as it was."""
  tensors, once = everything()
  found = lora_files.factors({"blocks.1.self_attn.q": (2, 2.0)})
  plain = lora_files.spelt("comfy", found)
  loras = [
    convert.load_lora("wan_dit", x, base[0]) for x in (tensors, plain, tensors)
  ]
  params = convert.merge(base[1]["params"], convert.add(loras))
  expected = {
    n: x + 2 * (once[n] - x)
    for n, x in lora_files.merged_by_hand(found).items()
  }
  name = "blocks.1.self_attn.q.weight"
  expected[name] = lora_files.merged_by_hand(found)[name]
  expected[name] = expected[name] + 2 * (
    once[name] - lora_files.weights()[name]
  )
  lora_files.assert_merged(params, base, expected, atol=2e-5)


def test_shards_and_half_precision():
  """Sharded weights in bfloat16 are changed in float32 and rounded once."""
  half = np.dtype(jnp.bfloat16)
  mesh = sharding.make_mesh({"fsdp": 8})
  module, variables = convert.load(
    "wan_dit",
    lora_files.weights(dtype=half),
    lora_files.FIELDS,
    sharding=lambda x: sharding.shardings(x, mesh, [(".*", "fsdp")]),
  )
  before = {n: x.sharding for n, x in tree.flatten(variables).items()}
  tensors, _ = everything()
  updates = convert.load_lora("wan_dit", tensors, module)
  params = convert.merge(variables["params"], updates, donate=True)
  after = {n: x.sharding for n, x in tree.flatten({"params": params}).items()}
  assert before == after
  found = convert.to_torch("wan_dit", module, {"params": params}, "original")
  wrong = 0
  for name, (_, change) in zip(MODULES, FORMS.values(), strict=True):
    stored = lora_files.weights(dtype=half)[f"{name}.weight"]
    x = change(stored.astype(np.float64))
    assert found[f"{name}.weight"].dtype == half
    wrong += (
      found[f"{name}.weight"] != x.astype(np.float32).astype(half)
    ).sum()
  # Rarely, a sum in float32 falls on the other side of a rounding boundary.
  assert wrong <= 4


def test_parts_of_a_fused_kernel():
  """CLIP's q, k and v are one parameter here."""
  fields = {"image_size": 8, "patch": 4, "layers": 2, "width": 16, "heads": 2}
  fields |= {"ffn_width": 12}
  state = checkpoints.state_dict("clip_vision", fields, "transformers")
  module, variables = convert.load("clip_vision", state, fields)
  tensors, expected = {}, dict(state)
  parts = ((0, "q"), (0, "v"), (1, "k"))
  kinds = ("lokr", "dora rows", "ia3 of peft")
  for (layer, part), kind in zip(parts, kinds, strict=True):
    name = f"vision_model.encoder.layers.{layer}.self_attn.{part}_proj"
    own, change = FORMS[kind]
    tensors |= {f"base_model.model.{name}.{end}": x for end, x in own.items()}
    expected[f"{name}.weight"] = change(state[f"{name}.weight"])
  updates = convert.load_lora("clip_vision", tensors, module)
  params = convert.merge(variables["params"], updates)
  found = convert.to_torch("clip_vision", module, {"params": params})
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)


def test_a_vector_of_inputs_or_outputs():
  """PEFT's vector of a convolution does not tell, where both are as many."""
  fields = lora_files.FIELDS | {"in_channels": 16}
  state = checkpoints.state_dict("wan_dit", fields, "original")
  module, _ = convert.load("wan_dit", state, fields)
  tensors = {"patch_embedding.ia3_l": np.ones((1, 16, 1, 1, 1), np.float32)}
  with pytest.raises(errors.UserError, match="may scale the inputs or the out"):
    convert.load_lora("wan_dit", tensors, module)


@pytest.mark.parametrize(("on_input", "size"), [(1, 16), (0, 24)])
def test_a_vector_of_another_size(base, on_input, size):
  name = "blocks.0.ffn.2"  # 24 inputs, 16 outputs.
  tensors = {
    f"{name}.weight": np.ones(size, np.float32),
    f"{name}.on_input": np.array(on_input),
  }
  with pytest.raises(
    errors.UserError, match=f"has {size} numbers for blocks.0"
  ):
    convert.load_lora("wan_dit", tensors, base[0])


def test_they_cannot_be_kept_apart(base):
  updates = convert.load_lora("wan_dit", everything()[0], base[0])
  with pytest.raises(errors.UserError, match=r"apart: blocks/cross_attn/o/ker"):
    convert.with_lora("wan_dit", base[0], updates)


def test_no_alpha_of_whole_factors_is_told(base):
  tensors = {f"{MODULES[0]}.{end}": x for end, x in WHOLE.items()}
  with pytest.warns(UserWarning, match="no alpha is known"):
    convert.load_lora("wan_dit", tensors, base[0])


def test_a_norm_of_zero_is_refused(base):
  """PEFT divides by it; so do we, and say so."""
  weights = lora_files.weights()
  weights["blocks.0.ffn.2.weight"][3] = 0
  module, variables = convert.load("wan_dit", weights, lora_files.FIELDS)
  tensors = {
    "blocks.0.ffn.2.lora_A.weight": np.zeros((2, 24), np.float32),
    "blocks.0.ffn.2.lora_B.weight": np.zeros((16, 2), np.float32),
    "blocks.0.ffn.2.lora_magnitude_vector": np.ones(16, np.float32),
  }
  updates = convert.load_lora("wan_dit", tensors, module)
  with pytest.raises(errors.UserError, match="linear_2/kernel would hold NaN"):
    convert.merge(variables["params"], updates)


# --- what is skipped ---------------------------------------------------------


@pytest.mark.parametrize("spelling", ["comfy", "kohya", "diffusers", "peft"])
def test_the_interface_is_skipped(base, spelling):
  """Updates of a model with another latent space fit without the interface."""
  wide = lora_files.FIELDS | {"in_channels": 9, "out_channels": 9}
  ranks = lora_files.RANKS | {"patch_embedding": (2, 1.0)}
  found = lora_files.factors(ranks, wide)
  tensors = lora_files.spelt(spelling, found, ranks)
  updates = convert.load_lora("wan_dit", tensors, base[0], skip="interface")
  assert (updates.matched, updates.skipped) == (len(tensors) - 6, 6)
  kept = {
    n: x for n, x in found.items() if n not in ("patch_embedding", "head.head")
  }
  params = convert.merge(base[1]["params"], updates)
  lora_files.assert_merged(
    params, base, lora_files.merged_by_hand(kept, lora_files.RANKS)
  )


def test_patterns_are_skipped(base):
  found = lora_files.factors()
  tensors = lora_files.spelt("comfy", found, lora_files.RANKS)
  skip = [r"blocks\.0\.", "cross_attn", "nothing like this"]
  updates = convert.load_lora("wan_dit", tensors, base[0], skip=skip)
  assert (updates.matched, updates.skipped) == (12, 9)
  kept = {
    n: x for n, x in found.items() if "blocks.0" not in n and "cross" not in n
  }
  params = convert.merge(base[1]["params"], updates)
  lora_files.assert_merged(
    params, base, lora_files.merged_by_hand(kept, lora_files.RANKS)
  )


@pytest.mark.parametrize(
  ("skip", "message"),
  [
    ("blocks|time|head", "mapping: skip leaves none of its 14 tensors"),
    ("(", "the mapping: skip=( is no regular expression: "),
    (["ffn.0.lora_A"], "missing diffusion_model.blocks.0.ffn.0.lora_A.weight"),
  ],
)
def test_skipping_too_much(base, skip, message):
  tensors = lora_files.spelt("comfy", lora_files.factors())
  with pytest.raises(errors.UserError) as e:
    convert.load_lora("wan_dit", tensors, base[0], skip=skip)
  assert message in str(e.value)
