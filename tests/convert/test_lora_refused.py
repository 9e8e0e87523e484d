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
      lambda t: t | {"diffusion_model.blocks.0.ffn.0.dora_scale": np.ones(16)},
      "blocks.0.ffn.0.dora_scale: expected (24, 1), found (16,)",
    ),
    (
      lambda t: t | {"diffusion_model.blocks.0.ffn.2.dora_scale": np.ones(16)},
      "unexpected diffusion_model.blocks.0.ffn.2.dora_scale (16,)",
    ),
    (
      lambda t: t | {"diffusion_model.blocks.0.ffn.2.ia3_l": np.ones((1, 16))},
      "blocks.0.ffn.2.ia3_l: expected (16, 1), found (1, 16)",
    ),
    (
      lambda t: t | {"diffusion_model.blocks.0.ffn.2.on_input": np.array(1)},
      "missing diffusion_model.blocks.0.ffn.2.weight (16,)",
    ),
    (
      lambda t: t | {"lora_unet_blocks_0_ffn_2.lokr_w1": np.ones((3, 4))},
      "lokr_w1: expected (1, 4), found (3, 4)",
    ),
    (
      lambda t: t | {"lora_unet_blocks_0_ffn_2.lokr_w1": np.ones((4, 4))},
      "missing lora_unet_blocks_0_ffn_2.lokr_w2_a (4, 0)",
    ),
    (
      lambda t: t | {"lora_unet_blocks_0_ffn_2.hada_w1_b": np.ones((2, 24))},
      "lora_unet_blocks_0_ffn_2.hada_w2_a (16, 2); missing lora_unet_blocks_0"
      "_ffn_2.hada_w2_b (2, 24)",
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
  "LoRA of a layer that it widens": ("blocks.0.ffn.0.reshape_weight",),
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
      lora_names.require_known(names, "a model")
      names["blocks.0.ffn.0.lora_embedding_A"] = None
      with pytest.raises(errors.UserError, match="LoRA of embeddings"):
        lora_names.require_known(names, "a model")


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


def test_another_latent_space_is_told(base):
  """The interface layers of Wan's base, which an adapted model replaces."""
  wide = lora_files.FIELDS | {"in_channels": 9, "out_channels": 9}
  ranks = {"patch_embedding": (2, 1.0), "head.head": (2, 1.0)}
  tensors = lora_files.spelt("comfy", lora_files.factors(ranks, wide))
  assert refused(base, tensors).endswith(
    "it is of a model with another latent space: skip=interface leaves these"
    " tensors out"
  )
  ranks = {"blocks.0.ffn.0": (2, 1.0), "head.head": (2, 1.0)}
  wide |= {"width": 24}
  tensors = lora_files.spelt("comfy", lora_files.factors(ranks, wide))
  assert "skip=" not in refused(base, tensors)


@pytest.mark.parametrize("spelling", ["comfy", "kohya"])
def test_updates_are_no_model(spelling):
  with pytest.raises(errors.UserError, match="updates only, no weights"):
    convert.load(
      "wan_dit",
      lora_files.spelt(spelling, lora_files.factors()),
      lora_files.FIELDS,
    )
