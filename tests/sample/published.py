"""Writes small random models as the published repositories hold them."""

import functools
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import dcvideogen_jax
from dcvideogen_jax import convert
from tests import random_weights

ASSETS = pathlib.Path(dcvideogen_jax.__file__).parent / "assets"
TINY = ASSETS / "dcvideogen_tiny"

TEXT_WIDTH = 16
ENCODER = {
  "vocab": 1024,  # As the shipped tokenizer.
  "layers": 1,
  "width": TEXT_WIDTH,
  "heads": 2,
  "head_width": 8,
  "ffn_width": 24,
}
AUTOENCODER = {
  "latent_channels": 4,
  "widths": (8, 8, 8, 8),
  "depths": (0, 1, 1, 1),
  "chunk_frames": 8,
  "spatial_factor": 4,
  "latent_scale": 0.9,
}
# Names of the original file are those of four levels and two blocks.
WAN_VAE = {
  "latent_channels": 4,
  "base_width": 4,
  "mean": (0.1, -0.2, 0.3, 0.0),
  "std": (1.1, 0.9, 1.3, 0.7),
}
# Wan's own config.json gives neither the width of the image features nor the
# number for two images: they are those of CLIP ViT-H.
CLIP = {
  "image_size": 224,
  "patch": 14,
  "layers": 1,
  "width": 1280,
  "heads": 16,
  "ffn_width": 16,
}
_DIT = {
  "layers": 2,
  "width": 24,
  "heads": 2,
  "ffn_width": 32,
  "in_channels": 4,
  "out_channels": 4,
  "text_width": TEXT_WIDTH,
  "frequencies": 16,
}
_IMAGE = {"in_channels": 12, "image_width": 1280}
DIT = {
  "dc_t2v": _DIT | {"patch": (1, 1, 1)},
  "dc_i2v": _DIT | {"patch": (1, 1, 1)} | _IMAGE,
  "wan_t2v": _DIT,
  "wan_i2v": _DIT | _IMAGE,
  "wan_flf2v": _DIT | _IMAGE | {"image_positions": 514},
}
SCHEDULER = {
  "_class_name": "UniPCMultistepScheduler",
  "_diffusers_version": "0.35.2",
  "flow_shift": 3.0,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
}
# Configs of files that have no config.json beside them.
_CONFIGS = {
  "dc_ae_v": AUTOENCODER,
  "wan_vae": WAN_VAE,
  "umt5": ENCODER,
  "clip_vision": CLIP,
}
LAYOUTS = {
  "nvidia": ("dc_t2v", "dc_i2v"),
  "dc-ai": ("dc_t2v", "dc_i2v"),
  "elsewhere": ("dc_t2v", "dc_i2v"),
  "diffusers": ("wan_t2v", "wan_i2v", "wan_flf2v"),
  "original": ("wan_t2v", "wan_i2v", "wan_flf2v"),
}


class Model(NamedTuple):
  kind: str
  module: Any
  variables: Any


@functools.cache
def model(kind: str, name: str | None = None) -> Model:
  """Returns a random model, always the same; `name` is a key of `DIT`."""
  fields = DIT[name] if kind == "wan_dit" else _CONFIGS[kind]
  module = convert.KINDS[kind].build(fields)
  example = convert.KINDS[kind].example(module)
  return Model(kind, module, random_weights.of(module, *example))


def load(kind, source, **options):
  """Calls `convert.load` with the config of a small model, if it needs one."""
  if pathlib.Path(source).is_file():
    options["config"] = _CONFIGS[kind]
  return convert.load(kind, source, **options)


def write(directory: pathlib.Path, layout: str, name: str) -> dict[str, Any]:
  """Writes the model `name` of `DIT` in a layout.

  Returns:
    Further arguments that `loading.load` needs for this layout.
  """
  dit = model("wan_dit", name)
  directory.mkdir(parents=True, exist_ok=True)
  return _WRITERS[layout](directory, dit, name)


def _nvidia(directory, dit, name):
  save(directory / f"transformer_{name[-3:]}", dit, "diffusers", shards=True)
  _write_texts(directory)
  torch_save(directory / "dc-ae-v-f32t4c32-1.0-bf16.pt", model("dc_ae_v"))
  clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
  torch_save(directory / clip, model("clip_vision"), "original")
  return {}


def _dc_ai(directory, dit, name):
  save(directory / "transformer", dit, "diffusers")
  _write_texts(directory)
  torch_save(directory / "dc-ae-v-f32t4c32.pt", model("dc_ae_v"))
  if name.endswith("t2v"):
    return {}
  # CLIP is in another repository, which has other parts too.
  other = directory.with_name(f"{directory.name}-clip")
  save(other / "image_encoder", model("clip_vision"), "transformers")
  (other / "transformer").mkdir()
  return {"image_encoder": other}


def _elsewhere(directory, dit, name):
  save(directory / "mine", dit, None)
  save(directory / "shared" / "autoencoder", model("dc_ae_v"), None)
  save(directory / "shared" / "clip", model("clip_vision"), "transformers")
  _write_texts(directory)
  parts = {
    "transformer": "mine",
    "dc_ae_v": "shared/autoencoder",
    "image_encoder": str(directory / "shared" / "clip"),
  }
  (directory / "parts.json").write_text(json.dumps(parts))
  return {}


def _diffusers(directory, dit, name):
  save(directory / "transformer", dit, "diffusers", shards=True)
  save(directory / "vae", model("wan_vae"), "diffusers")
  _write_texts(directory)
  if not name.endswith("t2v"):
    save(directory / "image_encoder", model("clip_vision"), "transformers")
  return {}


def _original(directory, dit, name):
  save(directory, dit, "original", shards=True)
  torch_save(directory / "Wan2.1_VAE.pth", model("wan_vae"), "original")
  encoder = directory / "models_t5_umt5-xxl-enc-bf16.pth"
  torch_save(encoder, model("umt5"), "original")
  shutil.copytree(TINY / "tokenizer", directory / "google" / "umt5-xxl")
  if not name.endswith("t2v"):
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch_save(directory / clip, model("clip_vision"), "original")
  return {}


_WRITERS = {
  "nvidia": _nvidia,
  "dc-ai": _dc_ai,
  "elsewhere": _elsewhere,
  "diffusers": _diffusers,
  "original": _original,
}


def _write_texts(directory):
  save(directory / "text_encoder", model("umt5"), "transformers")
  shutil.copytree(TINY / "tokenizer", directory / "tokenizer")
  (directory / "scheduler").mkdir()
  (directory / "scheduler" / "scheduler_config.json").write_text(
    json.dumps(SCHEDULER)
  )


def save(directory, made: Model, layout, shards=False):
  convert.save(
    directory,
    made.kind,
    made.module,
    made.variables,
    layout=layout,
    shard_size=20_000 if shards else None,
  )


def torch_save(path, made: Model, layout=None):
  import torch

  state = convert.to_torch(made.kind, made.module, made.variables, layout)
  torch.save({k: torch.tensor(x) for k, x in state.items()}, path)
