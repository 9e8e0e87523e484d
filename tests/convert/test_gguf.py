"""GGUF files are read as the gguf library dequantises them."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import sources
from tests.convert import checkpoints

gguf_writing = pytest.importorskip("tests.convert.gguf_writing")
pytestmark = pytest.mark.parity

# Rows of whole blocks of 256 numbers.
T2V = checkpoints.T2V | {
  "layers": 2,
  "width": 256,
  "heads": 2,
  "ffn_width": 512,
  "text_width": 256,
  "frequencies": 256,
}
UMT5 = {
  "vocab": 40,
  "layers": 2,
  "width": 256,
  "heads": 4,
  "head_width": 64,
  "ffn_width": 512,
}
# As many layers as it takes to have a matrix of every type.
CLIP = {
  "image_size": 28,
  "patch": 14,
  "layers": 4,
  "width": 256,
  "heads": 4,
  "ffn_width": 512,
}
LLAMA_CPP = {
  r"shared\.": "token_embd.",
  r"encoder\.final_layer_norm\.": "enc.output_norm.",
  r"encoder\.block\.(\d+)\.layer\.0\.layer_norm": r"enc.blk.\1.attn_norm",
  r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.": (
    r"enc.blk.\1.attn_\2."
  ),
  r"encoder\.block\.(\d+).*relative_attention_bias": r"enc.blk.\1.attn_rel_b",
  r"encoder\.block\.(\d+)\.layer\.1\.layer_norm": r"enc.blk.\1.ffn_norm",
  r"encoder\.block\.(\d+)\..*wi_0": r"enc.blk.\1.ffn_gate",
  r"encoder\.block\.(\d+)\..*wi_1": r"enc.blk.\1.ffn_up",
  r"encoder\.block\.(\d+)\..*wo": r"enc.blk.\1.ffn_down",
}
MODELS = {
  "transformer": ("wan_dit", T2V, "original", "wan"),
  "transformer of diffusers": ("wan_dit", T2V, "diffusers", "wan"),
  "image-to-video": (
    "wan_dit",
    T2V | {"image_width": 256, "in_channels": 12},
    "original",
    "wan",
  ),
  "UMT5": ("umt5", UMT5, "transformers", "t5encoder"),
  "UMT5 of Wan": ("umt5", UMT5, "original", "umt5"),
  "CLIP": ("clip_vision", CLIP, "transformers", "clip"),
  "CLIP of Wan": ("clip_vision", CLIP, "original", "clip"),
}


def to_llama_cpp(name):
  for theirs, new in LLAMA_CPP.items():
    name = re.sub(theirs, new, name)
  return name


@pytest.mark.parametrize(
  "kind", [*gguf_writing.QUANTISABLE, *gguf_writing.RANDOM, *gguf_writing.PLAIN]
)
def test_every_type(tmp_path, kind):
  array = np.random.default_rng(1).normal(size=(6, 512))
  tensors = {"x": (kind, gguf_writing.quantised(array, kind))}
  path = gguf_writing.write(tmp_path / "x.gguf", tensors, "other")
  expected = gguf_writing.read(path)["x"]
  found = sources.open_source(path)["x"]
  assert found.shape == (6, 512)
  np.testing.assert_array_equal(found.read().astype(np.float32), expected)
  for ends in ((0, 1), (2, 5), (5, 6)):
    memory = np.empty(4 * 512 * 6, np.uint8)
    part = found.rows(*ends, memory)
    assert np.shares_memory(part, memory)
    np.testing.assert_array_equal(
      part.astype(np.float32), expected[slice(*ends)]
    )
  if kind not in gguf_writing.PLAIN:
    assert found.stored.format == kind
    weight = found.stored.rows(1, 4)
    assert weight.values.dtype == found.stored.dtype
    assert weight.block == found.stored.block
    np.testing.assert_array_equal(weight.dequantise(), expected[1:4])


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name):
  """Exact in float32; by default the rounding of bfloat16."""
  kind, fields, layout, architecture = MODELS[name]
  prefix = "model.diffusion_model." if name == "image-to-video" else ""
  arrays = checkpoints.state_dict(kind, fields, layout)
  rename = to_llama_cpp if architecture == "t5encoder" else str
  tensors = {prefix + rename(n): x for n, x in arrays.items()}
  stored = gguf_writing.mixed(tensors)
  path = gguf_writing.write(tmp_path / "x.gguf", stored, architecture)
  read = gguf_writing.read(path)
  expected = {
    n: read[prefix + rename(n)].reshape(arrays[n].shape) for n in arrays
  }
  assert {kind for kind, _ in stored.values()} == {
    *gguf_writing.QUANTISABLE,
    *gguf_writing.RANDOM,
    *gguf_writing.PLAIN,
  }

  found = loaded(kind, path, fields, layout, jnp.float32)
  for n, x in expected.items():
    np.testing.assert_array_equal(found[n], x, err_msg=n)
  for dtype in (jnp.bfloat16, None):
    found = loaded(kind, tmp_path, fields, layout, dtype)
    for n, x in expected.items():
      # Layers in float16 or float32 make a stack of layers float32, and some
      # parameters stay float32 always.
      assert found[n].dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
      np.testing.assert_array_equal(found[n], x.astype(found[n].dtype), n)


def loaded(kind, path, fields, layout, dtype=None):
  module, variables = convert.load(kind, path, fields, dtype=dtype)
  return convert.to_torch(kind, module, variables, layout)


def test_llama_cpp_names_no_layer_of_clip(tmp_path):
  arrays = checkpoints.state_dict("clip_vision", CLIP, "transformers")
  layers = r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1"
  renamed = {
    re.sub(layers, r"v.blk.\1.ffn_up", name): ("F32", x)
    for name, x in arrays.items()
  }
  path = gguf_writing.write(tmp_path / "x.gguf", renamed, "clip")
  with pytest.raises(errors.UserError, match=r"v\.blk\.0\.ffn_up"):
    convert.load("clip_vision", path, CLIP)


def test_a_quantised_stack_is_kept_in_bfloat16(tmp_path):
  arrays = checkpoints.state_dict("wan_dit", T2V, "original")
  stored = {
    name: (kind, gguf_writing.quantised(x, kind))
    for name, x in arrays.items()
    for kind in ["Q8_0" if x.ndim == 2 else "F32"]
  }
  path = gguf_writing.write(tmp_path / "x.gguf", stored)
  _, variables = convert.load("wan_dit", path)
  block = variables["params"]["blocks"]["ffn"]["linear_1"]
  assert block["kernel"].dtype == jnp.bfloat16
  assert block["bias"].dtype == jnp.float32


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("shape", [(16, 48), (3, 256), (8, 4, 3, 2, 4)])
def test_shapes_of_the_model(tmp_path, kind, shape):
  """Rows that do not fill blocks are stored as rows of 256."""
  array = np.random.default_rng(2).normal(size=(3, 256))
  tensors = {"x": (kind, gguf_writing.quantised(array, kind))}
  path = gguf_writing.write(tmp_path / "x.gguf", tensors, "sd1", {"x": shape})
  expected = gguf_writing.read(path)["x"].reshape(shape)
  found = sources.open_source(path)["x"]
  assert found.shape == shape
  np.testing.assert_array_equal(found.read(), expected)
  for ends in ((0, 1), (1, 3), (2, 3)):
    np.testing.assert_array_equal(found.rows(*ends), expected[slice(*ends)])


def test_a_half_made_file_is_refused(tmp_path):
  arrays = checkpoints.state_dict("wan_dit", T2V, "original")
  del arrays["patch_embedding.weight"]
  path = gguf_writing.write(tmp_path / "x.gguf", gguf_writing.mixed(arrays))
  told = "is a half-made GGUF file: it lacks patch_embedding.weight.*fix_5d"
  with pytest.raises(errors.UserError, match=told):
    convert.load("wan_dit", path)


@pytest.mark.parametrize("kind", ["IQ2_XS", "TQ2_0", "MXFP4", "Q1_0"])
def test_other_types_are_refused_by_name(tmp_path, kind):
  numbers, size = gguf_writing.gguf.GGML_QUANT_SIZES[gguf_writing.Type[kind]]
  assert 512 % numbers == 0
  array = np.zeros((2, 512 // numbers * size), np.uint8)
  path = gguf_writing.write(tmp_path / "x.gguf", {"x": (kind, array)}, "other")
  told = f"x is quantised to {kind}, which is not read here: expected F32, F16"
  with pytest.raises(errors.UserError, match=told):
    sources.open_source(path)


def small(tmp_path):
  array = np.random.default_rng(3).normal(size=(2, 64))
  tensors = {
    "first": ("Q8_0", gguf_writing.quantised(array, "Q8_0")),
    "second": ("F32", gguf_writing.quantised(array, "F32")),
  }
  return gguf_writing.write(
    tmp_path / "x.gguf", tensors, "other", {"first": (2, 64)}
  )


def test_cut_files(tmp_path):
  path = small(tmp_path)
  content = path.read_bytes()
  for length in range(4, len(content)):
    path.write_bytes(content[:length])
    with pytest.raises(errors.UserError, match="is not a whole GGUF file"):
      sources.open_source(path)


def test_damaged_headers(tmp_path):
  """With a byte set to 255, a file is refused in one sentence, or read."""
  path = small(tmp_path)
  content = path.read_bytes()
  refused = 0
  for at in range(4, len(content) - 2 * 64 * 4 - 2 * 68):
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    try:
      for tensor in sources.open_source(path).values():
        tensor.read()
    except errors.UserError as e:
      assert str(path) in str(e) and len(str(e)) < len(str(path)) + 400
      refused += 1
  assert refused > 200


@pytest.mark.parametrize(
  ("number", "what"),
  [(1, "of version 1"), (0x03000000, "big-endian")],
)
def test_versions(tmp_path, number, what):
  path = small(tmp_path)
  content = bytearray(path.read_bytes())
  content[4:8] = number.to_bytes(4, "little")
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=f"it is {what}, expected little"):
    sources.open_source(path)
