"""DC-AE-V encodes and decodes a clip; the peer is `torch_dc_ae_v`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.sides import Side
from dcvideogen_jax import errors

NEEDS = {"jax": ("jax",), "torch": ("torch",)}


def request(config: Mapping[str, Any], clip: Sequence[int]) -> dict[str, Any]:
  """Returns what both sides take.

  Args:
    config: the fields of the model.
    clip: number, frames, height and width of the clips. Frames fill whole
      chunks; height and width are multiples of the spatial factor.

  Raises:
    errors.UserError: if the size of the clip does not fit.
  """
  from dcvideogen_jax.convert import api

  module = api.KINDS["dc_ae_v"].build(config)
  size = module.spatial_factor
  multiples = (1, module.frames_multiple, size, size)
  if any(n < 1 or n % m for n, m in zip(clip, multiples, strict=True)):
    raise errors.UserError(
      f"the clip must have a multiple of {module.frames_multiple} frames and of"
      f" {size} rows and columns, found {tuple(clip)}"
    )
  shapes = inputs.torch_shapes("dc_ae_v", "official", module)
  config = json.loads(json.dumps({**config}))
  return {"config": config, "clip": [*clip, 3], "shapes": shapes}


def torch(request: Mapping[str, Any]) -> Side:
  """Builds the peer."""
  import torch

  from benchmarks import torch_dc_ae_v

  peer = torch_dc_ae_v.Peer(
    inputs.torch_weights(request["shapes"]), request["config"]
  )
  video = inputs.clip(tuple(request["clip"]))

  def numpy(half, x):
    x = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    return np.moveaxis(half(x).numpy(), 1, -1)

  return _side(
    lambda x: numpy(peer.encode, x), lambda x: numpy(peer.decode, x), video
  )


def jax(request: Mapping[str, Any]) -> Side:
  """Builds the module, and compiles both halves."""
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api

  module = api.KINDS["dc_ae_v"].build(request["config"])
  params = inputs.params("dc_ae_v", "official", module, request["shapes"])
  video = inputs.clip(tuple(request["clip"]))

  def half(method, x):
    function = jax.jit(
      lambda p, x: module.apply({"params": p}, x, method=method)
    )
    return inputs.compiled(function, params, x)

  shape = jax.ShapeDtypeStruct(video.shape, jnp.float32)
  encode, first, encoding = half("encode", shape)
  latents = jax.eval_shape(
    lambda p, x: module.apply({"params": p}, x, method="encode"), params, shape
  )
  decode, second, decoding = half("decode", latents)
  side = _side(
    lambda x: np.asarray(encode(params, x)),
    lambda x: np.asarray(decode(params, x)),
    video,
  )
  return side._replace(
    compile_s=first + second,
    flops=lambda: {"encode": encoding(), "decode": decoding()},
  )


def _side(encode, decode, video) -> Side:
  kept = {}

  def encoded():
    kept["latents"] = encode(video)
    return kept["latents"]

  return Side({"encode": encoded, "decode": lambda: decode(kept["latents"])})
