"""Low-rank updates that do not fit are refused: no tensor is ignored."""

import re

import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import lora_names
from tests.convert import checkpoints, lora_files


def refused(base, tensors):
  with pytest.raises(errors.UserError) as e:
    convert.load_lora("wan_dit", tensors, base[0])
  return str(e.value)


@pytest.mark.parametrize("spelling", ["comfy", "kohya", "diffusers"])
def test_an_update_of_another_model_is_refused_with_names(base, spelling):
  """Image cross-attention and further layers, which this model lacks."""
  other = checkpoints.I2V | {"layers": 5}
  ranks = {f"blocks.{i}.cross_attn.k_img": (2, 1.0) for i in range(5)}
  ranks |= {"blocks.4.ffn.0": (2, 1.0), "blocks.0.ffn.0": (2, 1.0)}
  tensors = lora_files.spelt(spelling, lora_files.factors(ranks, other))
  message = refused(base, tensors)
  assert "(12 differences)" in message
  names = [n for n in tensors if "img" in n or "add_k" in n]
  assert f"unexpected {names[0]} ... {names[-2]} (5 names) (2, 16)" in message
  assert "blocks.0" in message or "blocks_0" in message
  assert not any(f"unexpected {n} " in message for n in tensors if "0.ffn" in n)


def test_an_update_of_another_width_is_refused(base):
  wide = lora_files.FIELDS | {"width": 24, "layers": 9}
  ranks = {"blocks.0.self_attn.q": (2, 1.0), "blocks.0.ffn.0": (2, 1.0)}
  message = refused(
    base, lora_files.spelt("comfy", lora_files.factors(ranks, wide))
  )
  assert (
    "shape of diffusion_model.blocks.0.self_attn.q.lora_A.weight: "
    "expected (2, 16), found (2, 24)" in message
  )


def without(tensors, *endings):
  return {n: x for n, x in tensors.items() if not n.endswith(endings)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: without(t, "blocks.0.ffn.0.lora_B.weight"),
      "missing diffusion_model.blocks.0.ffn.0.lora_B.weight (24, 4)",
    ),
    (
      lambda t: without(t, "0.ffn.0.lora_B.weight", "0.ffn.0.lora_A.weight"),
      "unexpected diffusion_model.blocks.0.ffn.0.alpha ()",
    ),
    (
      lambda t: t | {"diffusion_model.blocks.0.ffn.0.dora_scale": np.ones(24)},
      "holds DoRA (directions and magnitudes), such as"
      " diffusion_model.blocks.0.ffn.0.dora_scale, which is not read",
    ),
    (
      lambda t: t | {"head.head.weight": np.ones((16, 16), np.float32)},
      "unexpected head.head.weight (16, 16)",
    ),
    (
      lambda t: t | {"lora_te_text_model_x.lora_down.weight": np.ones((2, 2))},
      "unexpected lora_te_text_model_x.lora_down.weight (2, 2)",
    ),
    (
      lambda t: (
        t | {"diffusion_model.blocks.0.ffn.0.lora_A.b.weight": np.ones((4, 16))}
      ),
      "unexpected diffusion_model.blocks.0.ffn.0.lora_A.b.weight (4, 16)",
    ),
    (lambda t: {}, "holds no low-rank update"),
  ],
)
def test_nothing_is_passed_over(base, change, message):
  assert message in refused(
    base,
    change(lora_files.spelt("comfy", lora_files.factors(), lora_files.RANKS)),
  )


# As LyCORIS, kohya and PEFT write them.
OTHERS = {
  "LoKr": ("blocks_0_ffn_0.lokr_w1", "blocks.0.ffn.0.lokr_w2_a"),
  "LoHa": ("blocks_0_ffn_0.hada_w1_a", "blocks.0.ffn.0.hada_t2.default"),
  "DoRA": (
    "blocks_0_ffn_0.dora_scale",
    "blocks.0.ffn.0.lora_magnitude_vector",
    "blocks.0.ffn.0.lora_magnitude_vector.default.weight",
  ),
  "(IA)3": ("blocks_0_ffn_0.on_input", "blocks.0.ffn.0.ia3_l"),
  "LoCon in Tucker's form": ("blocks_0_ffn_0.lora_mid.weight",),
  "OFT or BOFT": (
    "blocks_0_ffn_0.oft_blocks",
    "blocks.0.ffn.0.oft_R.default.weight",
    "blocks.0.ffn.0.boft_s",
  ),
  "GLoRA": ("blocks_0_ffn_0.a1.weight",),
  "VeRA": ("blocks.0.ffn.0.vera_lambda_b",),
  "AdaLoRA": ("blocks.0.ffn.0.lora_E",),
  "KaSA": ("blocks.0.ffn.0.lora_diag",),
  "MonteCLoRA": ("blocks.0.ffn.0.lora_monteclora_sampler.std_prior",),
  "VeLoRA": ("blocks.0.ffn.0.lora_velora_embed",),
  "LoRA of embeddings": ("blocks.0.ffn.0.lora_embedding_A",),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "lycoris_"])
def test_other_adapters_are_refused_by_their_kind(base, kind, prefix):
  for name in OTHERS[kind]:
    tensors = {f"{prefix}{name}": np.ones((2, 2), np.float32)}
    tensors |= {"blocks.0.ffn.2.alpha": np.float32(1)}
    message = refused(base, tensors)
    assert f"the mapping holds {kind}" in message
    assert f"such as {prefix}{name}, which is not read" in message
    with pytest.raises(errors.UserError, match="which is not read"):
      convert.load("wan_dit", tensors, lora_files.FIELDS)


def test_no_model_has_the_names_of_other_adapters():
  for kind in convert.KINDS.values():
    for rules in kind.layouts.values():
      names = {re.sub(r"{\w+}", "0", rule.torch): None for rule in rules}
      lora_names.require_low_rank(names, "a model")
      names["blocks.0.ffn.0.lora_embedding_A"] = None
      with pytest.raises(errors.UserError, match="LoRA of embeddings"):
        lora_names.require_low_rank(names, "a model")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora_A": np.ones((0, 16)), "lora_B": np.ones((24, 0))}, "has rank 0"),
    ({"lora_A": np.ones(()), "lora_B": np.ones(24)}, "found (24,)"),
    ({"lora_A": np.ones((2, 2, 16))}, "expected (2, 16), found (2, 2, 16)"),
    ({"alpha": np.ones(2)}, "ffn.0.alpha: expected (1,), found (2,)"),
    ({"alpha": np.ones(0)}, "ffn.0.alpha: expected (1,), found (0,)"),
    ({"alpha": np.float32(np.nan)}, "ffn.0.alpha holds NaN or infinity"),
    ({"alpha": np.float64(1e300)}, "ffn.0.alpha holds NaN or infinity"),
    ({"alpha": np.float32(3e38)}, "times its scale of 7.5e+37 is not finite"),
    ({"lora_A": np.full((4, 16), 1e300)}, "lora_A.weight holds NaN or inf"),
    ({"lora_A": np.ones((4, 16), np.int8)}, "holds int8, quantised in a form"),
  ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_that_are_none(base, changes, message):
  ranks = {"blocks.0.ffn.0": (4, 2.0)}
  factors = lora_files.factors(ranks)
  a, b = factors["blocks.0.ffn.0"]
  factors["blocks.0.ffn.0"] = a, 10 * b
  tensors = lora_files.spelt("comfy", factors, ranks)
  for name, x in changes.items():
    end = name if name == "alpha" else f"{name}.weight"
    tensors[f"diffusion_model.blocks.0.ffn.0.{end}"] = x
  assert message in refused(base, tensors)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite(base, scale):
  tensors = lora_files.spelt("comfy", lora_files.factors())
  with pytest.raises(errors.UserError, match="expected a finite scale, found"):
    convert.load_lora("wan_dit", tensors, base[0], scale)


@pytest.mark.parametrize("size", [1e25, 2e3])
def test_a_merge_that_is_not_finite(size):
  """The factors are finite, but their product exceeds float32 or float16."""
  half = np.float16
  module, variables = convert.load(
    "wan_dit", lora_files.weights(dtype=half), lora_files.FIELDS
  )
  found = lora_files.factors({"blocks.1.ffn.2": (2, 2.0)})
  found = {n: tuple(size * x for x in pair) for n, pair in found.items()}
  found |= lora_files.factors({"head.head": (2, 2.0)})
  lora = convert.load_lora("wan_dit", lora_files.spelt("comfy", found), module)
  with pytest.raises(errors.UserError) as e:
    convert.merge(variables["params"], lora)
  assert str(e.value) == (
    "the mapping: with the updates added, blocks/ffn/linear_2/kernel would"
    " hold NaN or infinity"
  )


def test_nan_is_named(base):
  tensors = lora_files.spelt("comfy", lora_files.factors())
  tensors["diffusion_model.blocks.0.ffn.0.lora_A.weight"][1, 1] = np.nan
  assert "0.ffn.0.lora_A.weight holds NaN" in refused(base, tensors)


@pytest.mark.parametrize("spelling", ["comfy", "kohya"])
def test_updates_are_no_model(spelling):
  with pytest.raises(errors.UserError, match="updates only, no weights"):
    convert.load(
      "wan_dit",
      lora_files.spelt(spelling, lora_files.factors()),
      lora_files.FIELDS,
    )
