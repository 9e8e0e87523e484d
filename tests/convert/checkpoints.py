"""Writes random checkpoints as other libraries do, with their own writers."""

import json

import ml_dtypes
import numpy as np
import safetensors.numpy

from dcvideogen_jax import convert
from dcvideogen_jax.convert import matching, naming

# Transformers of a few thousand parameters; heads of 8 channels.
T2V = {
  "layers": 3,
  "width": 16,
  "heads": 2,
  "ffn_width": 24,
  "in_channels": 4,
  "out_channels": 4,
  "text_width": 12,
  "frequencies": 8,
}
I2V = T2V | {"in_channels": 12, "image_width": 10, "patch": (1, 1, 1)}
FLF2V = I2V | {"image_positions": 6}
MODELS = {
  "t2v": T2V,
  "i2v": I2V,
  "flf2v": FLF2V,
}
# The smallest model whose fields can be inferred: heads of 128 channels.
INFERRED = T2V | {"width": 128, "heads": 1, "layers": 2}


def shapes(kind, fields, layout):
  """Returns shapes by their official names."""
  module = convert.KINDS[kind].build(fields)
  rules = convert.KINDS[kind].layouts[layout]
  return naming.torch_shapes(rules, matching.parameters(kind, module))


def state_dict(kind, fields, layout, dtype=np.float32, seed=0):
  """Returns random arrays by their official names."""
  random = np.random.default_rng(seed)
  return {
    name: (0.2 * random.normal(size=shape)).astype(dtype)
    for name, shape in shapes(kind, fields, layout).items()
  }


def write_sharded(directory, tensors, count, stem="diffusion_pytorch_model"):
  """Writes `count` files, to which tensors go in turn, and their index."""
  directory.mkdir(parents=True, exist_ok=True)
  files = [
    f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
  ]
  where = {name: files[i % count] for i, name in enumerate(tensors)}
  for file in files:
    held = {name: x for name, x in tensors.items() if where[name] == file}
    safetensors.numpy.save_file(held, directory / file, {"format": "pt"})
  index = {
    "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
    "weight_map": where,
  }
  path = directory / f"{stem}.safetensors.index.json"
  path.write_text(json.dumps(index))
  return path


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def random_weights(name="t2v", layout="diffusers", **options):
  return state_dict("wan_dit", MODELS[name], layout, **options)


def mixed_dtypes():
  """Returns weights in the dtypes of diffusers' file of a bfloat16 model."""
  return {
    name: x
    if "norm" in name or "table" in name or "time_embedder" in name
    else x.astype(ml_dtypes.bfloat16)
    for name, x in random_weights().items()
  }
