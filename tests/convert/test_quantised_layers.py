"""Weights beside their scales are read as their formats define them.

The expected weights follow from the definitions, element by element, and
products are rounded to float32 once.
"""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import block_scales, quantised_layers, sources
from tests.convert import checkpoints
from tests.damage import torch_files

FLOAT8 = ml_dtypes.float8_e4m3fn
# Rows of whole blocks of 32, and some that do not fill tiles of 128 rows.
SIZES = {"width": 64, "heads": 2, "layers": 2, "ffn_width": 160}
T2V = checkpoints.T2V | SIZES | {"text_width": 32, "frequencies": 32}
# As many layers as it takes to have a layer in every format.
UMT5 = SIZES | {"layers": 3, "vocab": 64, "head_width": 32}
CLIP = SIZES | {"layers": 5, "image_size": 28, "patch": 14}
MODELS = {
  "transformer": ("wan_dit", T2V, "original", ""),
  "transformer of ComfyUI": (
    "wan_dit",
    T2V,
    "original",
    "model.diffusion_model.",
  ),
  "transformer of diffusers": ("wan_dit", T2V, "diffusers", ""),
  "UMT5": ("umt5", UMT5, "transformers", ""),
  "UMT5 of Wan": ("umt5", UMT5, "original", ""),
  "CLIP": ("clip_vision", CLIP, "transformers", ""),
  "CLIP of Wan": ("clip_vision", CLIP, "original", ""),
}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def small(random, shape, dtype):
  if dtype == np.int8:
    return random.integers(-128, 128, shape).astype(dtype)
  return (100 * random.normal(size=shape)).clip(-400, 400).astype(dtype)


def scales(random, *shape):
  return random.uniform(0.001, 0.01, shape).astype(np.float32)


def times(values, scale):
  return (values.astype(np.float64) * scale.astype(np.float64)).astype(
    np.float32
  )


def scaled(shape, dtype, name, scale_name="scale_weight"):
  """One scale, one for each row, or one for each block of a row."""
  random = np.random.default_rng(shape)
  grid = {
    "one": (),
    "list of one": (1,),
    "rows": (shape[0], 1),
    "flat rows": (shape[0],),
    "blocks": (shape[0], shape[1] // 16, 1),
  }[name]
  values, scale = small(random, shape, dtype), scales(random, *grid)
  width = shape[1] // (grid[1] if len(grid) > 1 else 1)
  by_row = np.broadcast_to(
    scale.reshape(1 if scale.size == 1 else shape[0], -1),
    (shape[0], max(1, scale.size // shape[0])),
  )
  expected = times(values, np.repeat(by_row, width, 1)[:, : shape[1]])
  return {"weight": values, scale_name: scale}, expected


def described(parts, **description):
  text = json.dumps(description).encode()
  return parts | {"comfy_quant": np.frombuffer(text, np.uint8)}


def comfy(shape, dtype, name, scale, **more):
  parts, expected = scaled(shape, dtype, scale, "weight_scale")
  return described(parts, format=name) | more, expected


def tiles(scale):
  """Puts scales into the order of cuBLAS, one after another."""
  rows, columns = (
    -(-n // m) * m for n, m in zip(scale.shape, (128, 4), strict=True)
  )
  flat = np.zeros(rows * columns, scale.dtype)
  for i, j in np.ndindex(scale.shape):
    tile = (i // 128) * (columns // 4) + j // 4
    flat[tile * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] = scale[i, j]
  return flat.reshape(rows, columns)


def fp4(shape, high_first):
  random = np.random.default_rng(shape)
  codes = random.integers(0, 16, shape, dtype=np.uint8)
  high, low = codes[:, 0::2], codes[:, 1::2]
  if not high_first:
    high, low = low, high
  block = random.uniform(1, 400, (shape[0], shape[1] // 16)).astype(FLOAT8)
  return codes, high << 4 | low, block, np.float32(random.uniform(1e-5, 1e-4))


def nvfp4(shape, scale_dtype=FLOAT8):
  codes, packed, block, second = fp4(shape, True)
  both = block.astype(np.float32) * second
  parts = {
    "weight": packed,
    "weight_scale": tiles(block).view(scale_dtype),
    "weight_scale_2": second,
    "input_scale": np.float32(0.5),
  }
  expected = times(FP4[codes], np.repeat(both, 16, 1))
  return described(parts, format="nvfp4"), expected


def lightx2v_nvfp4(shape, **names):
  codes, packed, block, second = fp4(shape, False)
  if names:
    parts = {"input_global_scale": np.float32(4), "alpha": second / 4}
  else:
    parts = {"weight_global_scale": 1 / second, "input_absmax": np.float32(3)}
    second = np.float32(1) / parts["weight_global_scale"]
  both = block.astype(np.float32) * second
  parts |= {"weight": packed, "weight_scale": tiles(block)}
  return parts, times(FP4[codes], np.repeat(both, 16, 1))


def mxfp8(shape, scale_dtype=np.uint8):
  random = np.random.default_rng(shape)
  values = small(random, shape, FLOAT8)
  exponents = random.integers(110, 130, (shape[0], shape[1] // 32))
  block = 2.0 ** (exponents - 127)
  parts = {
    "weight": values,
    "weight_scale": tiles(exponents.astype(np.uint8)).view(scale_dtype),
  }
  expected = times(values, np.repeat(block, 32, 1))
  return described(parts, format="mxfp8"), expected


def turbo(shape):
  random = np.random.default_rng(shape)
  values = small(random, shape, np.int8)
  scale = scales(random, *(-(-n // 128) for n in shape))
  whole = np.repeat(np.repeat(scale, 128, 0), 128, 1)
  expected = times(values, whole[: shape[0], : shape[1]])
  return {"int8_weight": values, "scale": scale}, expected


INPUT = np.float32(0.7)
FORMATS = {
  "ComfyUI scaled fp8, old": lambda s: scaled(s, FLOAT8, "one"),
  "ComfyUI scaled fp8, old, list": lambda s: (
    scaled(s, FLOAT8, "list of one")[0] | {"scale_input": INPUT},
    scaled(s, FLOAT8, "list of one")[1],
  ),
  "ComfyUI float8_e4m3fn": lambda s: comfy(
    s, FLOAT8, "float8_e4m3fn", "one", input_scale=INPUT
  ),
  "ComfyUI float8_e5m2": lambda s: comfy(
    s, ml_dtypes.float8_e5m2, "float8_e5m2", "one"
  ),
  "ComfyUI int8, one scale": lambda s: comfy(
    s, np.int8, "int8_tensorwise", "one"
  ),
  "ComfyUI int8, rows": lambda s: comfy(s, np.int8, "int8_tensorwise", "rows"),
  "ComfyUI nvfp4": nvfp4,
  "ComfyUI nvfp4, scales as bytes": lambda s: nvfp4(s, np.uint8),
  "ComfyUI mxfp8": lambda s: mxfp8(s, ml_dtypes.float8_e8m0fnu),
  "ComfyUI mxfp8, scales as bytes": mxfp8,
  "LightX2V fp8": lambda s: scaled(s, FLOAT8, "rows", "weight_scale"),
  "LightX2V int8": lambda s: scaled(s, np.int8, "rows", "weight_scale"),
  "LightX2V int8, flat": lambda s: scaled(
    s, np.int8, "flat rows", "weight_scale"
  ),
  "LightX2V nvfp4": lightx2v_nvfp4,
  "LightX2V nvfp4, alpha": lambda s: lightx2v_nvfp4(s, alpha=True),
  "musubi fp8, one scale": lambda s: scaled(s, FLOAT8, "list of one"),
  "musubi fp8, rows": lambda s: scaled(s, FLOAT8, "rows"),
  "musubi fp8, blocks": lambda s: scaled(s, FLOAT8, "blocks"),
  "TurboDiffusion int8": turbo,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(160, 64), (300, 288)])
def test_formats(tmp_path, name, shape):
  """Whole weights, rows of them, and their inner form."""
  parts, expected = FORMATS[name](shape)
  path = tmp_path / "x.safetensors"
  stored = {f"a.b.{part}": np.asarray(x) for part, x in parts.items()}
  safetensors.numpy.save_file(stored | {"a.b.bias": np.ones(3)}, path)
  found = quantised_layers.join("x", sources.open_source(path))
  assert found.keys() == {"a.b.weight", "a.b.bias"}
  weight = found["a.b.weight"]
  assert weight.shape == shape
  np.testing.assert_array_equal(weight.read(), expected)
  for ends in ((0, 1), (5, 140), (127, 129), (128, 160)):
    memory = np.empty(4 * expected.size, np.uint8)
    part = weight.rows(*ends, memory)
    np.testing.assert_array_equal(part, expected[slice(*ends)])
    inner = weight.stored.rows(*ends)
    assert inner.values.dtype == weight.stored.dtype
    assert inner.values.dtype.itemsize == 1
    np.testing.assert_array_equal(inner.dequantise(), expected[slice(*ends)])


def fitting(name, shape):
  """Whether a layer can be quantised so."""
  return len(shape) == 2 and all(n % 32 == 0 for n in shape)


@pytest.mark.parametrize("model", MODELS)
def test_models(tmp_path, model):
  """All formats in one file; exact in float32, by default in bfloat16."""
  kind, fields, layout, prefix = MODELS[model]
  arrays = checkpoints.state_dict(kind, fields, layout)
  expected, stored, turn = dict(arrays), {}, 0
  for name, array in arrays.items():
    if not fitting(name, array.shape):
      stored[prefix + name] = array
      continue
    parts, expected[name] = [*FORMATS.values()][turn % len(FORMATS)](
      array.shape
    )
    turn += 1
    layer = prefix + name.removesuffix("weight")
    stored |= {layer + part: np.asarray(x) for part, x in parts.items()}
  assert turn >= len(FORMATS)
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(stored, path)
  module, variables = convert.load(kind, path, fields, dtype=jnp.float32)
  found = convert.to_torch(kind, module, variables, layout)
  checkpoints.assert_same(found, expected)
  module, variables = convert.load(kind, tmp_path, fields)
  found = convert.to_torch(kind, module, variables, layout)
  for name, x in expected.items():
    kept = ml_dtypes.bfloat16 if fitting(name, x.shape) else np.float32
    assert found[name].dtype == kept, name
    np.testing.assert_array_equal(found[name], x.astype(kept), name)


@pytest.mark.parametrize("mark", ["scaled_fp8", "model.scaled_fp8"])
@pytest.mark.parametrize("count", [0, 2])
def test_the_mark_of_old_files(mark, count):
  parts, expected = FORMATS["ComfyUI scaled fp8, old"]((32, 32))
  tensors = {f"x.{part}": value for part, value in parts.items()}
  tensors |= {mark: np.zeros(count, FLOAT8), "y.weight": parts["weight"]}
  with pytest.warns(match="1 weights in float8 have no scale .* such as y.w"):
    found = quantised_layers.join("f", sources.open_source(tensors))
  assert found.keys() == {"x.weight", "y.weight"}
  np.testing.assert_array_equal(found["x.weight"].read(), expected)


@pytest.mark.parametrize("named", ["a.b", "model.diffusion_model.a.b"])
def test_descriptions_in_the_header(tmp_path, named):
  """With or without the prefix of the names."""
  parts, expected = FORMATS["ComfyUI nvfp4"]((160, 64))
  del parts["comfy_quant"]
  layers = {named: {"format": "nvfp4"}, "other": {"format": "nvfp4"}}
  text = json.dumps({"format_version": "1.0", "layers": layers})
  path = tmp_path / "x.safetensors"
  layer = "model.diffusion_model.a.b."
  stored = {layer + part: np.asarray(x) for part, x in parts.items()}
  safetensors.numpy.save_file(stored, path, {"_quantization_metadata": text})
  found = quantised_layers.join("x", sources.open_source(path))
  assert found.keys() == {layer + "weight"}
  np.testing.assert_array_equal(found[layer + "weight"].read(), expected)


@pytest.mark.parametrize(
  "text", ["[]", "{", '{"layers": 3}', '{"layers": null}', "{}"]
)
def test_descriptions_that_make_no_sense(tmp_path, text):
  path = tmp_path / "x.safetensors"
  header = {"_quantization_metadata": text}
  safetensors.numpy.save_file({"a.weight": np.ones((2, 2))}, path, header)
  told = f"{path} is not a whole safetensors file: its _quantization_metadata"
  with pytest.raises(errors.UserError, match=told):
    sources.open_source(path)


def test_a_pickle(tmp_path):
  """TurboDiffusion publishes pickles."""
  parts, expected = turbo((160, 64))
  torch_files.write(
    tmp_path / "x.pth", {f"a.{part}": x for part, x in parts.items()}
  )
  opened = sources.open_source(tmp_path / "x.pth")
  found = quantised_layers.join("x", opened)
  np.testing.assert_array_equal(found["a.weight"].read(), expected)


def without(name, part):
  def make():
    parts, _ = FORMATS[name]((160, 64))
    del parts[part]
    return parts

  return make


def with_part(name, part, value):
  return lambda: FORMATS[name]((160, 64))[0] | {part: value}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      without("ComfyUI nvfp4", "weight_scale_2"),
      "a is quantised, but weight_scale_2 is missing",
    ),
    (without("ComfyUI mxfp8", "weight_scale"), "weight_scale is missing"),
    (without("ComfyUI int8, rows", "weight"), "but weight is missing"),
    (without("TurboDiffusion int8", "scale"), "but scale is missing"),
    (without("musubi fp8, rows", "weight"), "but weight is missing"),
    (
      with_part(
        "musubi fp8, rows", "scale_weight", np.ones((159, 1), np.float32)
      ),
      r"a.scale_weight has shape \(159, 1\), which does not fit weights of",
    ),
    (
      with_part(
        "musubi fp8, blocks", "scale_weight", np.ones((160, 3, 1), np.float32)
      ),
      r"shape \(160, 3, 1\), which does not fit",
    ),
    (
      with_part("TurboDiffusion int8", "scale", np.ones((1, 1), np.float32)),
      r"a.scale has shape \(1, 1\).*expected of shape \(2, 1\)",
    ),
    (
      with_part("ComfyUI nvfp4", "weight_scale", np.ones((160, 4), FLOAT8)),
      r"scales of shape \(160, 4\).*expected \(256, 4\)",
    ),
    (
      with_part("ComfyUI mxfp8", "weight", np.ones((160, 40), FLOAT8)),
      r"in blocks of 32: expected rows of whole blocks, found shape \(160,",
    ),
    (
      with_part("LightX2V int8", "weight_scale", np.ones((1, 160), np.float32)),
      r"a.weight_scale has shape \(1, 160\), which does not fit",
    ),
    (
      with_part("musubi fp8, rows", "weight", np.ones((160, 64), np.float32)),
      "expected float8_e4m3fn or float8_e5m2, found float32",
    ),
    (
      with_part("ComfyUI nvfp4", "weight_scale_2", np.ones(3, np.int8)),
      "a.weight_scale_2 is quantised: expected float32, found int8",
    ),
    (
      with_part("ComfyUI nvfp4", "comfy_quant", np.zeros(9, np.uint8)),
      "a.comfy_quant does not describe a format, expected a JSON object",
    ),
    (
      with_part("ComfyUI nvfp4", "comfy_quant", np.zeros(1 << 17, np.uint8)),
      "a.comfy_quant does not describe a format",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  tensors = {f"a.{part}": value for part, value in make().items()}
  with pytest.raises(errors.UserError, match=message) as caught:
    quantised_layers.join("f.safetensors", sources.open_source(tensors))
  assert str(caught.value).startswith("f.safetensors: a")


def test_the_order_of_scales():
  """A tile of the definition, one element after another."""
  scale = np.arange(256 * 8).reshape(256, 8)
  np.testing.assert_array_equal(block_scales.in_order(tiles(scale)), scale)
