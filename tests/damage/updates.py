"""Low-rank updates, as several trainers write them."""

import functools
import json

import numpy as np
import safetensors.numpy

from dcvideogen_jax import convert
from tests.convert import lora_files
from tests.damage import reading, torch_files

_ALPHA = (
  *reading.MISSING,
  r"alpha\S* is (0\.5|1|3\.0|\d+)$",
  "use_rslora is True",
)


@functools.cache
def _target():
  return convert.KINDS["wan_dit"].build(lora_files.FIELDS)


def _updates(place):
  def read(directory):
    found = convert.load_lora("wan_dit", directory / place, _target())
    return {
      "matched": found.matched,
      **{f"{n}/a": a for n, (a, _) in found.factors.items()},
      **{f"{n}/b": b for n, (_, b) in found.factors.items()},
      **found.deltas,
      **found.whole,
    }

  return read


# Of one rank, as descriptions have one for all.
_RANKS = {module: (2, alpha) for module, (_, alpha) in lora_files.RANKS.items()}


def _peft(directory):
  found = lora_files.factors({**_RANKS, "blocks.0.ffn.0": (4, 2.0)})
  tensors = lora_files.spelt("peft", found)
  for name in ("patch_embedding.weight", "patch_embedding.bias"):
    tensors[f"base_model.model.{name}"] = lora_files.weights()[name] + 1
  safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
  config = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"head.head": 3.0, "ffn.0": 2},
    "rank_pattern": {"ffn.0": 4},
    "modules_to_save": ["patch_embedding"],
    "target_modules": ["q", "o", "ffn.0", "ffn.2", "head"],
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
  }
  (directory / "adapter_config.json").write_text(json.dumps(config))


def _of_kohya(directory):
  found = lora_files.factors()
  tensors = lora_files.spelt("kohya", found, lora_files.RANKS)
  tensors = {n: np.atleast_1d(x) for n, x in tensors.items()}
  safetensors.numpy.save_file(tensors, directory / "lora.safetensors")


def _of_diffusers(directory):
  tensors = lora_files.spelt("diffusers", lora_files.factors(_RANKS))
  config = {"transformer.r": 2, "transformer.lora_alpha": 4}
  safetensors.numpy.save_file(
    tensors,
    directory / "pytorch_lora_weights.safetensors",
    {"format": "pt", "lora_adapter_metadata": json.dumps(config)},
  )


def _of_comfy(directory):
  tensors = lora_files.spelt("comfy_down", lora_files.factors())
  width = lora_files.FIELDS["width"]
  differences = {
    "blocks.0.norm3.diff": np.full(width, 0.1, np.float32),
    "blocks.1.self_attn.q.diff_b": np.full(width, 0.2, np.float32),
  }
  tensors |= {f"diffusion_model.{n}": x for n, x in differences.items()}
  safetensors.numpy.save_file(tensors, directory / "lora.safetensors")


def _of_the_trainer(directory):
  found = lora_files.factors()
  state = {}
  for name, x in lora_files.weights().items():
    module = name.removesuffix(".weight")
    state[name.replace(module, f"{module}.base_layer")] = x
    if module not in found:
      state[name] = state.pop(name.replace(module, f"{module}.base_layer"))
  for module, (down, up) in found.items():
    state[f"{module}.lora_A.default.weight"] = down
    state[f"{module}.lora_B.default.weight"] = up
  torch_files.write(directory / "lora.pt", {"model_state_dict": state})


INPUTS = (
  reading.Input(
    "PEFT",
    "*.safetensors",
    "safetensors",
    _peft,
    _updates("."),
    "values",
    reading.WEIGHTS,
  ),
  reading.Input(
    "PEFT's config", "*.json", "json", _peft, _updates("."), "values", _ALPHA
  ),
  *(
    reading.Input(
      name,
      "*.safetensors",
      "safetensors",
      make,
      _updates(file),
      "values",
      (*reading.WEIGHTS, *_ALPHA),
    )
    for name, make, file in (
      ("kohya's updates", _of_kohya, "lora.safetensors"),
      (
        "diffusers' updates",
        _of_diffusers,
        "pytorch_lora_weights.safetensors",
      ),
      ("ComfyUI's updates", _of_comfy, "lora.safetensors"),
    )
  ),
  reading.Input(
    "trainer's updates",
    "*.pt",
    "torch",
    _of_the_trainer,
    _updates("lora.pt"),
    "values",
    reading.MEMBERS,
  ),
)
