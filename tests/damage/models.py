"""Weights and their configs."""

import functools
import json

import ml_dtypes
import numpy as np
import safetensors.numpy

from dcvideogen_jax import convert, tree
from tests.convert import checkpoints
from tests.damage import reading, torch_files
from tests.sample import published

_LATENTS = {"latent_channels": 4, "base_width": 4}
_WAN_VAE = _LATENTS | {
  "multipliers": (1, 1),
  "blocks": 1,
  "temporal": (True,),
  "mean": (0.1, -0.2, 0.3, 0.0),
  "std": (1.1, 0.9, 1.3, 0.7),
}
_CLIP = {
  "image_size": 28,
  "patch": 14,
  "layers": 1,
  "width": 16,
  "heads": 2,
  "ffn_width": 16,
}
_FIELDS = {
  "wan_dit": checkpoints.T2V,
  "wan_vae": _WAN_VAE,
  "umt5": published.ENCODER,
  "clip_vision": _CLIP,
  "dc_ae_v": published.AUTOENCODER,
}


@functools.cache
def _weights(kind, layout, dtype=np.float32):
  return checkpoints.state_dict(kind, _FIELDS[kind], layout, dtype)


def _flat(kind, variables):
  del kind
  return {n: np.asarray(x) for n, x in tree.flatten(variables).items()}


def reader(kind, place=".", config=None):
  """Reads a model, as everything that loads one does."""

  def read(directory):
    module, variables = convert.load(kind, directory / place, config)
    fields = convert.config_of(module)
    return {**{k: repr(v) for k, v in fields.items()}, **_flat(kind, variables)}

  return read


def _transformer(directory):
  checkpoints.write_sharded(directory, _weights("wan_dit", "diffusers"), 2)
  config = convert.KINDS["wan_dit"].configs["diffusers"](_config("wan_dit"))
  (directory / "config.json").write_text(json.dumps(config, indent=2))


def _config(kind):
  return convert.config_of(convert.KINDS[kind].build(_FIELDS[kind]))


def _original(directory):
  """As Wan's own repository: a file with a config.json of Wan's beside it."""
  tensors = _weights("wan_dit", "original", ml_dtypes.bfloat16)
  path = directory / "diffusion_pytorch_model.safetensors"
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})
  config = convert.KINDS["wan_dit"].configs["original"](_config("wan_dit"))
  (directory / "config.json").write_text(json.dumps(config))


def _own(directory):
  tensors = _weights("dc_ae_v", "official")
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  config = {"kind": "dc_ae_v", **_FIELDS["dc_ae_v"]}
  (directory / "config.json").write_text(json.dumps(config))


def _library(kind, layout, stem):
  def make(directory):
    tensors = _weights(kind, layout)
    safetensors.numpy.save_file(tensors, directory / f"{stem}.safetensors")
    config = convert.KINDS[kind].configs[layout](_config(kind))
    (directory / "config.json").write_text(json.dumps(config))

  return make


def _torch_file(kind, layout, name, dtype=np.float32, wrap=lambda x: x):
  def make(directory):
    torch_files.write(directory / name, wrap(_weights(kind, layout, dtype)))

  return make


def _of_a_trainer(state):
  """Averaged weights beside those of the last step, and the step."""
  half = dict(list(state.items())[::2])
  return {
    "model_state_dict": state,
    "ema_model_state_dict": {"0.999": {n: x + 1 for n, x in half.items()}},
    "step": 7,
  }


def _bin(directory):
  tensors = _weights("umt5", "transformers", ml_dtypes.bfloat16)
  torch_files.write(directory / "pytorch_model.bin", tensors)
  config = convert.KINDS["umt5"].configs["transformers"](_config("umt5"))
  (directory / "config.json").write_text(json.dumps(config))


EPS = (*reading.MISSING, r"eps(ilon)? is (0\.5|1|3\.0|1e-300)$")
_SCALE = (*reading.MISSING, r"latent_scale is (0\.5|1|3\.0|\d+)$")
_STATISTICS = (
  r"latents_mean\.\d is -?[\d.e+-]+$",
  r"latents_std\.\d is (0\.5|1|3\.0|\d\d+)$",
  r"latents_(mean|std).* (as|and) latents_(mean|std)",
)

INPUTS = (
  *(
    reading.Input(
      f"transformer {name}", target, form, _transformer, read, blind, free
    )
    for read in [reader("wan_dit")]
    for name, target, form, blind, free in (
      (
        "shard",
        "*1-of-00002.safetensors",
        "safetensors",
        "values",
        reading.WEIGHTS,
      ),
      ("index", "*.index.json", "json", "nothing", ()),
      ("config", "config.json", "json", "values", EPS),
    )
  ),
  *(
    reading.Input(
      f"original {name}", target, form, _original, read, "values", free
    )
    for read in [reader("wan_dit")]
    for name, target, form, free in (
      ("weights", "*.safetensors", "safetensors", reading.WEIGHTS),
      ("config", "config.json", "json", EPS),
    )
  ),
  reading.Input(
    "autoencoder weights",
    "model.safetensors",
    "safetensors",
    _own,
    reader("dc_ae_v"),
    "values",
    reading.WEIGHTS,
  ),
  reading.Input(
    "autoencoder config",
    "config.json",
    "json",
    _own,
    reader("dc_ae_v"),
    "values",
    _SCALE,
  ),
  reading.Input(
    "autoencoder .pt",
    "*.pt",
    "torch",
    _torch_file("dc_ae_v", "official", "dc-ae-v.pt", ml_dtypes.bfloat16),
    reader("dc_ae_v", "dc-ae-v.pt", _FIELDS["dc_ae_v"]),
    "values",
    reading.MEMBERS,
  ),
  reading.Input(
    "trainer's .pt",
    "*.pt",
    "torch",
    _torch_file("wan_dit", "original", "step.pt", wrap=_of_a_trainer),
    reader("wan_dit", "step.pt", checkpoints.T2V),
    "values",
    reading.MEMBERS,
  ),
  reading.Input(
    "Wan's VAE .pth",
    "*.pth",
    "torch",
    _torch_file("wan_vae", "diffusers", "Wan2.1_VAE.pth"),
    reader("wan_vae", "Wan2.1_VAE.pth", _WAN_VAE),
    "values",
    reading.MEMBERS,
  ),
  reading.Input(
    "Wan's VAE config",
    "config.json",
    "json",
    _library("wan_vae", "diffusers", "diffusion_pytorch_model"),
    reader("wan_vae"),
    "values",
    _STATISTICS,
  ),
  reading.Input(
    "text encoder .bin",
    "*.bin",
    "torch",
    _bin,
    reader("umt5"),
    "values",
    reading.MEMBERS,
  ),
  reading.Input(
    "text encoder config",
    "config.json",
    "json",
    _bin,
    reader("umt5"),
    "values",
    EPS,
  ),
  reading.Input(
    "image encoder config",
    "config.json",
    "json",
    _library("clip_vision", "transformers", "model"),
    reader("clip_vision"),
    "values",
    EPS,
  ),
)
