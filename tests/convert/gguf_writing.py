"""Writes GGUF files with the gguf library, and reads them back with it."""

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType
# Types that the library cannot write get random blocks.
QUANTISABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
RANDOM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
PLAIN = ("F32", "F16", "BF16")
# Where the float16 numbers of a block are, in bytes.
_HALVES = {
  "Q2_K": (80, 82),
  "Q3_K": (108,),
  "Q4_K": (0, 2),
  "Q5_K": (0, 2),
  "Q6_K": (208,),
  "IQ4_NL": (0,),
  "IQ4_XS": (0,),
}


def quantised(array, name, seed=0):
  """Returns an array in a type of gguf: bytes, with the rows of the array."""
  if name == "F32":
    return array.astype(np.float32)
  if name == "F16":
    return array.astype(np.float16)
  if name not in RANDOM:
    return gguf.quantize(array.astype(np.float32), Type[name])
  numbers, size = gguf.GGML_QUANT_SIZES[Type[name]]
  random = np.random.default_rng(seed)
  shape = (*array.shape[:-1], array.shape[-1] // numbers)
  raw = random.integers(0, 256, (*shape, size), dtype=np.uint8)
  for at in _HALVES[name]:
    halves = random.uniform(0.001, 0.01, (*shape, 1)).astype(np.float16)
    raw[..., at : at + 2] = halves.view(np.uint8)
  return raw.reshape(*shape[:-1], -1)


def write(path, tensors, architecture="wan", shapes=None):
  """Writes tensors, name -> (name of a type, array in it).

  Args:
    path: the file.
    tensors: tensors by name.
    architecture: general.architecture.
    shapes: name -> shape that the tensor has in the model.
  """
  writer = gguf.GGUFWriter(str(path), architecture)
  writer.add_quantization_version(2)
  writer.add_array("tokenizer.ggml.tokens", ["one", "two", "äö"])
  writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
  writer.add_bool("general.some_flag", True)
  for name, shape in (shapes or {}).items():
    writer.add_array(f"comfy.gguf.orig_shape.{name}", [*shape])
  for name, (kind, array) in tensors.items():
    writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=Type[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def read(path):
  """Returns the float32 arrays by name, as the library dequantises them."""
  return {
    tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
      tensor.shape[::-1].tolist()
    )
    for tensor in gguf.GGUFReader(str(path)).tensors
  }


def mixed(arrays):
  """Quantises matrices to all types in turn; what files leave in F32 stays."""
  kinds = (*QUANTISABLE, *RANDOM, "F16", "BF16")
  found, turn = {}, 0
  for name, array in arrays.items():
    kind = "F32"
    if array.ndim == 2 and array.size > 1024 and "modulation" not in name:
      kind = kinds[turn % len(kinds)]
      turn += 1
    found[name] = (kind, quantised(array, kind, turn))
  return found
