"""Runs one side of `reconstruct.compare`, alone in its process.

  python -m benchmarks.worker < request.json

Writes the outputs to the request's `outputs` (.npz) and a JSON object with the
measurements as the last line of stdout.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import inputs, processes


class Side(NamedTuple):
  """The autoencoder in one framework; arrays are numpy, channels last.

  Attributes:
    compile_s: seconds of compilation.
    encode: video in [-1, 1] to latents.
    decode: latents to video.
  """

  compile_s: float
  encode: Callable[[np.ndarray], np.ndarray]
  decode: Callable[[np.ndarray], np.ndarray]


def main() -> None:
  """Times the side that the request on stdin names."""
  request = json.load(sys.stdin)
  processes.pin(request["threads"])
  start = time.perf_counter()
  side = {"jax": _jax, "torch": _torch}[request["side"]](request)
  video = inputs.clip(tuple(request["clip"]))
  measured = {
    "load_s": time.perf_counter() - start - side.compile_s,
    "compile_s": side.compile_s,
    "loaded_bytes": processes.peak_bytes(),
    "encode_s": [],
    "decode_s": [],
  }
  for _ in range(request["repeats"]):
    start = time.perf_counter()
    latents = side.encode(video)
    middle = time.perf_counter()
    output = side.decode(latents)
    measured["encode_s"].append(middle - start)
    measured["decode_s"].append(time.perf_counter() - middle)
  measured["peak_bytes"] = processes.peak_bytes()
  np.savez(request["outputs"], latents=latents, video=output)
  print(json.dumps(measured))


def _torch(request: dict[str, Any]) -> Side:
  import torch

  from benchmarks import torch_dc_ae_v

  torch.set_num_threads(request["threads"])
  weights = {
    name: torch.from_numpy(inputs.weight(name, tuple(shape)))
    for name, shape in request["shapes"].items()
  }
  peer = torch_dc_ae_v.Peer(weights, request["config"])

  def numpy(half):
    def run(x):
      x = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
      return np.moveaxis(half(x).numpy(), 1, -1)

    return run

  return Side(0.0, numpy(peer.encode), numpy(peer.decode))


def _jax(request: dict[str, Any]) -> Side:
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api, engine, sources

  kind = api.KINDS["dc_ae_v"]
  module = kind.build(request["config"])
  tensors = {
    name: sources.Tensor(
      tuple(shape),
      np.dtype(np.float32),
      lambda name=name, shape=shape: inputs.weight(name, tuple(shape)),
    )
    for name, shape in request["shapes"].items()
  }
  video = jax.ShapeDtypeStruct(request["clip"], jnp.float32)
  expected = jax.eval_shape(module.init, jax.random.key(0), video)["params"]
  rules = api.rules_of("dc_ae_v", None)
  params = engine.torch_to_jax(rules, tensors, expected, "random weights")

  def compiled(method, x):
    half = jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))
    return half.lower(params, x).compile(), jax.eval_shape(half, params, x)

  start = time.perf_counter()
  encode, latents = compiled("encode", video)
  decode, _ = compiled("decode", latents)
  return Side(
    time.perf_counter() - start,
    lambda x: np.asarray(encode(params, x)),
    lambda x: np.asarray(decode(params, x)),
  )


if __name__ == "__main__":
  main()
