"""Quantised weights are never misread: the refusal names their format."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors
from tests.convert import checkpoints

FIELDS = checkpoints.T2V | {"layers": 1}
NAME = "blocks.0.ffn.0"
FLOAT8 = ml_dtypes.float8_e4m3fn
CASTS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
SIZES = {"layers": 1, "width": 16, "heads": 2, "ffn_width": 24}
# Kind, fields, layout, prefix of the names, and the layer that is quantised.
MODELS = {
  "transformer": ("wan_dit", FIELDS, "original", "", NAME),
  "transformer of ComfyUI": (
    *("wan_dit", FIELDS, "original", "model.diffusion_model.", NAME),
  ),
  "UMT5": (
    "umt5",
    SIZES | {"vocab": 40, "head_width": 8},
    "transformers",
    "",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
  ),
  "CLIP": (
    "clip_vision",
    SIZES | {"image_size": 28, "patch": 14},
    "transformers",
    "",
    "vision_model.encoder.layers.0.mlp.fc1",
  ),
}


@pytest.fixture(scope="module")
def plain():
  return checkpoints.state_dict("wan_dit", FIELDS, "original")


def quantised(plain, prefix="", layer=NAME, **beside):
  """Replaces a layer's weight by the tensors that a quantising tool writes."""
  tensors = dict(plain)
  weight = tensors.pop(f"{layer}.weight")
  for suffix, value in beside.items():
    name = layer + "." + suffix.replace("__", ".")
    tensors[name] = value(weight) if callable(value) else value
  return {prefix + name: x for name, x in tensors.items()}


SCALE = np.array(0.01, np.float32)
ROWS = np.full((24, 1), 0.01, np.float32)


def json_bytes(**description):
  return np.frombuffer(json.dumps(description).encode(), np.uint8)


def fp8(x):
  return x.astype(FLOAT8)


def int8(x):
  return (x * 100).astype(np.int8)


def fp4(x):
  return np.zeros((24, 8), np.uint8)


FORMATS = {
  "in ComfyUI's mixed precision, format 'convrot_w4a4'": {
    "weight": int8,
    "weight_scale": ROWS,
    "comfy_quant": json_bytes(format="convrot_w4a4"),
  },
  "format int8_tensorwise with rotated inputs .convrot.": {
    "weight": int8,
    "weight_scale": ROWS,
    "comfy_quant": json_bytes(format="int8_tensorwise", convrot=True),
  },
  "format float8_e4m3fn with scaled inputs .pre_quant_scale.": {
    "weight": fp8,
    "weight_scale": SCALE,
    "pre_quant_scale": np.ones(16, np.float32),
    "comfy_quant": json_bytes(format="float8_e4m3fn"),
  },
  **{
    f"format '{name}'": {
      "weight": int8,
      "weight_scale": ROWS,
      "comfy_quant": json_bytes(format=name),
    }
    for name in ("asym_w4a8_int8", "awq_w4a16", "svdquant_w4a4")
  },
  "4 bits .NVFP4 or MXFP4. with scales": {"weight": fp4, "weight_scale": fp8},
  "to NVFP4": {
    "weight": fp4,
    "weight_scale": fp8,
    "weight_scale_2": SCALE,
  },
  "fp8 with scales of blocks": {"weight": fp8, "weight_scale_inv": ROWS},
  "by bitsandbytes": {"weight": int8, "SCB": ROWS[:, 0]},
  "bitsandbytes": {
    "weight": fp4,
    "weight__absmax": ROWS,
    "weight__quant_map": np.ones(16, np.float32),
  },
  "by optimum-quanto": {"weight___data": int8, "weight___scale": ROWS},
  "by torchao": {"weight_qdata": int8, "weight_zero_point": ROWS},
  "by Nunchaku": {"qweight": int8, "wscales": ROWS},
  "GPTQ, AWQ or MLX": {"qweight": int8, "qzeros": ROWS},
  "by HQQ": {"W_q": int8, "zero": ROWS},
  "as compressed-tensors does it": {
    "weight_packed": int8,
    "weight_scale": ROWS,
  },
  "with scales of inputs": {"weight": fp8, "input_scale": SCALE},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_formats_are_named(tmp_path, name, model):
  kind, fields, layout, prefix, layer = MODELS[model]
  path = tmp_path / "x.safetensors"
  arrays = checkpoints.state_dict(kind, fields, layout)
  tensors = quantised(arrays, prefix, layer, **FORMATS[name])
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match=f"is quantised .*{name}") as e:
    convert.load(kind, path, fields)
  told = str(e.value)
  assert told.startswith(str(path)) and " is quantised " in told
  assert layer in told and "which is not read here" in told
  assert len(told) < 400 + len(str(path)) and "\n" not in told


@pytest.mark.parametrize("marker", ["scaled_fp8", "model.scaled_fp8"])
def test_the_mark_of_a_file_without_its_scales(plain, marker):
  tensors = quantised(plain, weight=fp8) | {marker: np.zeros(0, FLOAT8)}
  with pytest.raises(errors.UserError, match="scaled fp8 as ComfyUI"):
    convert.load("wan_dit", tensors, FIELDS)


@pytest.mark.parametrize(
  "dtype", [np.int8, np.uint8, np.int16, np.int64, ml_dtypes.float8_e8m0fnu]
)
@pytest.mark.parametrize("model", ["transformer", "UMT5", "CLIP"])
def test_numbers_without_scales_are_no_weights(model, dtype):
  """Taken as floats, every one of them would be wrong."""
  kind, fields, layout, _, layer = MODELS[model]
  arrays = checkpoints.state_dict(kind, fields, layout)
  tensors = quantised(
    arrays, layer=layer, weight=lambda x: np.ones_like(x).astype(dtype)
  )
  told = rf"{layer}\.weight holds {np.dtype(dtype).name}, quantised in a form"
  with pytest.raises(errors.UserError, match=told):
    convert.load(kind, tensors, fields)


@pytest.mark.parametrize("model", ["transformer", "UMT5", "CLIP"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
def test_casts_to_float8_are_exact(model, dtype):
  kind, fields, layout, *_ = MODELS[model]
  arrays = checkpoints.state_dict(kind, fields, layout)
  matrices = [name for name, x in arrays.items() if x.ndim == 2]
  assert len(matrices) > len(CASTS)
  cast = {
    name: arrays[name].astype(CASTS[i % len(CASTS)])
    for i, name in enumerate(matrices)
  }
  loaded = convert.load(kind, arrays | cast, fields, dtype=dtype)
  found = convert.to_torch(kind, *loaded, layout)
  for name, x in cast.items():
    np.testing.assert_array_equal(
      found[name].astype(np.float32), x.astype(np.float32), name
    )


def test_a_config_that_says_so(tmp_path, plain):
  safetensors.numpy.save_file(plain, tmp_path / "x.safetensors")
  fields = convert.config_of(convert.KINDS["wan_dit"].build(FIELDS))
  config = convert.KINDS["wan_dit"].configs["diffusers"](fields)
  config["quantization_config"] = {"quant_method": "torchao", "quant_type": {}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  told = "config.json says that the weights are quantised by 'torchao'"
  with pytest.raises(errors.UserError, match=told):
    convert.load("wan_dit", tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16"])
def test_dtypes_of_pt(tmp_path, name):
  """torch has no storage class for these and saves bytes with a dtype."""
  import torch

  from dcvideogen_jax.convert import sources

  x = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
  torch.save({"x": x, "turned": x.T, "rows": x[1:3]}, tmp_path / "x.pt")
  opened = sources.open_source(tmp_path / "x.pt")
  expected = np.arange(24).reshape(4, 6)
  for key, value in (
    ("x", expected),
    ("turned", expected.T),
    ("rows", expected[1:3]),
  ):
    found = opened[key].read()
    assert found.dtype.name == name
    value = value.astype(found.dtype).astype(np.float32)
    np.testing.assert_array_equal(found.astype(np.float32), value)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors_of_torch(tmp_path):
  import torch

  x = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
  torch.save({"x": x}, tmp_path / "x.pt")
  with pytest.raises(errors.UserError, match="weights quantised by PyTorch"):
    convert.load("wan_dit", tmp_path / "x.pt", FIELDS)
