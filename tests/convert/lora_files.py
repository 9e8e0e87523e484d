"""Low-rank updates of a tiny transformer, as every trainer spells them."""

import numpy as np

from dcvideogen_jax import convert
from tests.convert import checkpoints

FIELDS = checkpoints.T2V
# Updated layers: (rank, alpha) of each.
RANKS = {
  "blocks.0.self_attn.q": (2, 4.0),
  "blocks.2.self_attn.q": (3, 3.0),
  "blocks.1.cross_attn.o": (2, 1.0),
  "blocks.0.ffn.0": (4, 2.0),
  "blocks.1.ffn.2": (1, 8.0),
  "time_embedding.2": (2, 6.0),
  "head.head": (2, 2.0),
}


def weights(layout="original", dtype=np.float32):
  return checkpoints.state_dict("wan_dit", FIELDS, layout, dtype)


def factors(ranks=RANKS, fields=FIELDS, seed=1):
  """Returns (down, up) by the module's name in the original layout."""
  random = np.random.default_rng(seed)
  shapes = checkpoints.shapes("wan_dit", fields, "original")
  found = {}
  for module, (rank, _) in ranks.items():
    out, *inside = shapes[f"{module}.weight"]
    found[module] = tuple(
      (0.3 * random.normal(size=s)).astype(np.float32)
      for s in ((rank, *inside), (out, rank, *(1 for _ in inside[1:])))
    )
  return found


def diffusers_name(module):
  """Returns diffusers' name for a module of the original layout."""
  rules = convert.KINDS["wan_dit"].layouts
  table = {rule.torch: rule.jax for rule in rules["original"]}
  names = {rule.jax: rule.torch for rule in rules["diffusers"]}
  number = module.split(".")[1] if module.startswith("blocks.") else "0"
  pattern = module.replace(f"blocks.{number}.", "blocks.{i}.", 1)
  name = names[table[f"{pattern}.weight"]].removesuffix(".weight")
  return name.format(i=number)


SPELLINGS = {
  "peft": ("base_model.model.{}", "lora_A.weight", "lora_B.weight"),
  "comfy": ("diffusion_model.{}", "lora_A.weight", "lora_B.weight"),
  "comfy_down": ("diffusion_model.{}", "lora_down.weight", "lora_up.weight"),
  "diffsynth": ("{}", "lora_A.default.weight", "lora_B.default.weight"),
  "diffsynth_pipe": ("pipe.dit.{}", "lora_A.weight", "lora_B.weight"),
  "kohya": ("lora_unet_{}", "lora_down.weight", "lora_up.weight"),
  "kohya_double": ("lora_unet__{}", "lora_down.weight", "lora_up.weight"),
  "diffusers": ("transformer.{}", "lora_A.weight", "lora_B.weight"),
  "diffusers_old": ("transformer.{}", "lora.down.weight", "lora.up.weight"),
  "diffusers_peft": (
    "base_model.model.{}",
    "lora_A.style.weight",
    "lora_B.style.weight",
  ),
  "kohya_diffusers": (
    "lora_transformer_{}",
    "lora_down.weight",
    "lora_up.weight",
  ),
  # `spelt` replaces dots by underscores where the key contains "kohya".
  "kohya_lycoris": ("lycoris_{}", "lora_down.weight", "lora_up.weight"),
  "kohya_lycoris_diffusers": (
    "lycoris_{}",
    "lora_down.weight",
    "lora_up.weight",
  ),
  "diffusers_older": (
    "transformer.{}",
    "lora_linear_layer.down.weight",
    "lora_linear_layer.up.weight",
  ),
}


def spelt(spelling, found, alphas=None):
  """Returns the tensors of factors as one of the trainers writes them."""
  pattern, down, up = SPELLINGS[spelling]
  tensors = {}
  for module, (a, b) in found.items():
    name = diffusers_name(module) if "diffusers" in spelling else module
    name = name.replace(".", "_") if "kohya" in spelling else name
    name = pattern.format(name)
    tensors[f"{name}.{down}"], tensors[f"{name}.{up}"] = a, b
    if alphas is not None:
      tensors[f"{name}.alpha"] = np.float32(alphas[module][1])
  return tensors


def merged_by_hand(found, alphas=None, scale=1.0, dtype=np.float32):
  """Returns the state dict with `scale * alpha / rank * up @ down` added."""
  state = {n: x.astype(np.float64) for n, x in weights(dtype=dtype).items()}
  for module, (a, b) in found.items():
    alpha = len(a) if alphas is None else alphas[module][1]
    product = b.reshape(len(b), -1).astype(np.float64) @ a.reshape(len(a), -1)
    kernel = state[f"{module}.weight"]
    kernel += scale * alpha / len(a) * product.reshape(kernel.shape)
  return state


def assert_merged(params, base, expected, atol=1e-6):
  found = convert.to_torch("wan_dit", base[0], {"params": params}, "original")
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(
      found[name].astype(np.float64), x, atol=atol, rtol=0, err_msg=name
    )


def alphas(ranks, rule):
  return {m: (rank, rule(m, rank)) for m, (rank, _) in ranks.items()}
