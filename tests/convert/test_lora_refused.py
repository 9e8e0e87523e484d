"""Updates of which nothing may be passed over in silence."""

import numpy as np
import pytest

from dcvideogen_jax import convert, errors
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
      "unexpected diffusion_model.blocks.0.ffn.0.dora_scale (24,)",
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
