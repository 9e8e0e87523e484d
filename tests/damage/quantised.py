"""Quantised weights, as several programs write them."""

import importlib.util

import ml_dtypes
import numpy as np
import safetensors.numpy

from dcvideogen_jax import convert
from tests.convert import checkpoints
from tests.damage import models, reading

# Rows of whole blocks of 32 numbers.
_FIELDS = checkpoints.T2V | {
  "width": 32,
  "ffn_width": 64,
  "text_width": 32,
  "frequencies": 32,
}
# Changes of numbers and scales that make another, right input.
_SCALES = (*reading.WEIGHTS, r"dtype of .* is 'F8_E4M3'")


def _state():
  return checkpoints.state_dict("wan_dit", _FIELDS, "original")


def _gguf(directory):
  from tests.convert import gguf_writing

  kinds = ("Q4_0", "Q8_0", "Q5_1")
  tensors, turn = {}, 0
  for name, array in _state().items():
    kind = "F32"
    if array.ndim == 2 and "modulation" not in name:
      kind = kinds[turn % len(kinds)]
      turn += 1
    tensors[name] = (kind, gguf_writing.quantised(array, kind))
  gguf_writing.write(directory / "wan.gguf", tensors)


def _scaled_float8(directory):
  """As ComfyUI and musubi-tuner write them."""
  tensors = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
  for name, array in _state().items():
    tensors[name] = array
    if ".attn" in name or "ffn" in name:
      if name.endswith(".weight") and array.ndim == 2:
        scale = np.float32(np.abs(array).max() / 448)
        tensors[name] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name.removesuffix('weight')}scale_weight"] = scale[None]
  safetensors.numpy.save_file(tensors, directory / "wan.safetensors")


def _int8(directory):
  """As `convert --weights=int8` writes them."""
  module, variables = convert.load("wan_dit", _state(), _FIELDS, weights="int8")
  convert.save(directory, "wan_dit", module, variables)


INPUTS = (
  *(
    reading.Input(
      name, target, form, make, models.reader("wan_dit", place, fields), *rest
    )
    for name, target, form, make, place, fields, rest in (
      (
        "scaled float8",
        "*.safetensors",
        "safetensors",
        _scaled_float8,
        "wan.safetensors",
        _FIELDS,
        ("values", _SCALES),
      ),
      (
        "int8 weights",
        "*.safetensors",
        "safetensors",
        _int8,
        ".",
        None,
        ("values", _SCALES),
      ),
      (
        "int8 config",
        "config.json",
        "json",
        _int8,
        ".",
        None,
        ("values", (*models.EPS, r"rope_scale\.\d is (0\.5|3\.0|\d+|as)")),
      ),
      (
        "GGUF",
        "*.gguf",
        "bytes",
        _gguf,
        "wan.gguf",
        _FIELDS,
        ("values",),
      ),
    )
    # Only the environment of the parity tests has the library of GGUF.
    if form != "bytes" or importlib.util.find_spec("gguf")
  ),
)
