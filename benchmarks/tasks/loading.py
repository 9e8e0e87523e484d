"""Loads a checkpoint of Wan's transformer, beside diffusers.

After loading, every value is read once, so that pages that were only mapped
count too.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.sides import Side

NEEDS = {"jax": ("jax",), "torch": ("torch", "diffusers")}
_KIND, _LAYOUT = "wan_dit", "diffusers"


def write(
  directory: pathlib.Path, fields: Mapping[str, Any], shard_gb: float = 1.0
) -> int:
  """Writes random bfloat16 weights in diffusers' format, and reads them once.

  They are then in the operating system's page cache.

  Args:
    directory: an existing folder.
    fields: configuration of the transformer.
    shard_gb: size of a file in GB (1e9 bytes).

  Returns:
    The size of all files in bytes.
  """
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api, matching, naming, sources, writing

  kind = api.KINDS[_KIND]
  module = kind.build(fields)
  shapes = naming.torch_shapes(
    kind.layouts[_LAYOUT], matching.parameters(_KIND, module)
  )
  values = np.random.default_rng(0).normal(scale=0.02, size=1 << 20)
  values = values.astype(jnp.bfloat16)
  tensors = {
    name: sources.Tensor(
      shape,
      values.dtype,
      lambda i=i, shape=shape: np.resize(np.roll(values, i), shape),
    )
    for i, (name, shape) in enumerate(shapes.items())
  }
  files = writing.write_directory(
    directory,
    kind.stem,
    tensors,
    kind.configs[_LAYOUT](api.config_of(module)),
    shard_size=int(shard_gb * 1e9),
  )
  os.sync()
  memory = bytearray(1 << 24)
  for path in sorted(directory.iterdir()):
    with path.open("rb", buffering=0) as file:
      while file.readinto(memory):
        pass
  return sum(file.stat().st_size for file in files)


def jax(request: Mapping[str, Any]) -> Side:
  """Loads with this library."""
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax import convert

  jax.block_until_ready(jnp.zeros(1))

  def load():
    _, variables = convert.load(_KIND, request["directory"])
    return jax.block_until_ready(jax.tree.leaves(variables))

  return _side(load, lambda leaf: np.asarray(leaf).view(np.int16))


def torch(request: Mapping[str, Any]) -> Side:
  """Loads with diffusers."""
  import torch
  from diffusers import WanTransformer3DModel

  torch.zeros(1)

  def load():
    module = WanTransformer3DModel.from_pretrained(
      request["directory"], torch_dtype=torch.bfloat16
    )
    return [*module.parameters()]

  def bits(x):
    # diffusers keeps some parameters in float32.
    return x.detach().to(torch.bfloat16).view(torch.int16).numpy()

  return _side(load, bits)


def _side(load, bits) -> Side:
  """Returns the calls "load" and "read", which sums the bits of all values."""
  kept = {}

  def loaded():
    kept["leaves"] = load()
    return np.zeros(1)

  def read():
    total = 0
    for leaf in kept.pop("leaves"):
      total += int(bits(leaf).sum(dtype=np.int64))
    return np.asarray(total)

  return Side({"load": loaded, "read": read})
