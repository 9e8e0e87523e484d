"""Runs one side of `dit.compare`, alone in its process.

  python -m benchmarks.dit_worker < request.json

Writes the velocity to the request's `output` (.npy) and a JSON object with the
measurements as the last line of stdout.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import inputs, processes

_TIMESTEP = 700.0

# Seconds of compilation, and a step that returns the velocity, channels last.
Side = tuple[float, Callable[[], np.ndarray]]


def main() -> None:
  """Times the side that the request on stdin names."""
  request = json.load(sys.stdin)
  processes.pin(request["threads"])
  start = time.perf_counter()
  latents, text = (
    np.random.default_rng(seed).standard_normal(request[name], np.float32)
    for seed, name in enumerate(("latents", "text"))
  )
  make = {"jax": _jax, "torch": _torch}[request["side"]]
  compile_s, step = make(request, latents, text)
  measured = {
    "load_s": time.perf_counter() - start - compile_s,
    "compile_s": compile_s,
    "loaded_bytes": processes.resident_bytes(),
  }
  seconds, core_seconds = [], []
  for _ in range(1 + request["repeats"]):
    start, core_start = time.perf_counter(), time.process_time()
    output = step()
    seconds.append(time.perf_counter() - start)
    core_seconds.append(time.process_time() - core_start)
  measured["first_s"], *measured["step_s"] = seconds
  measured["core_s"] = core_seconds[1:]
  measured["peak_bytes"] = processes.peak_bytes()
  np.save(request["output"], output)
  print(json.dumps(measured))


def _jax(request: dict[str, Any], latents: Any, text: Any) -> Side:
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api, engine, matching, sources

  kind, dtype = api.KINDS["wan_dit"], jnp.dtype(request["dtype"])
  module = kind.build(request["fields"], dtype=dtype, param_dtype=dtype)
  tensors = {
    name: sources.Tensor(
      tuple(shape),
      np.dtype(np.float32),
      lambda name=name, shape=shape: inputs.weight(name, tuple(shape)),
    )
    for name, shape in request["shapes"].items()
  }
  variables = {
    "params": engine.torch_to_jax(
      kind.layouts["diffusers"],
      tensors,
      matching.parameters("wan_dit", module),
      "random weights",
    )
  }
  arguments = jax.block_until_ready(
    (
      variables,
      jnp.asarray(latents),
      jnp.asarray([_TIMESTEP], jnp.float32),
      jnp.asarray(text),
    )
  )
  start = time.perf_counter()
  step = jax.jit(module.apply).lower(*arguments).compile()
  compile_s = time.perf_counter() - start
  return compile_s, lambda: np.asarray(step(*arguments), np.float32)


def _torch(request: dict[str, Any], latents: Any, text: Any) -> Side:
  import torch
  from diffusers import WanTransformer3DModel

  torch.set_num_threads(request["threads"])
  dtype = getattr(torch, request["dtype"])
  config = {k: v for k, v in request["config"].items() if k[0] != "_"}
  with torch.device("meta"):
    model = WanTransformer3DModel(**config)
  # RoPE tables are no weights, so no state dict restores them from "meta".
  model.rope = type(model.rope)(
    config["attention_head_dim"],
    config["patch_size"],
    config["rope_max_seq_len"],
  )

  def weight(name, shape):
    kept = set(name.split(".")) & set(model._keep_in_fp32_modules)
    x = torch.from_numpy(inputs.weight(name, tuple(shape)))
    return x.to(torch.float32 if kept else dtype)

  weights = {name: weight(name, s) for name, s in request["shapes"].items()}
  model.load_state_dict(weights, assign=True)
  latents = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()).to(dtype)
  text = torch.from_numpy(text).to(dtype)
  time_ = torch.tensor([_TIMESTEP])

  def step():
    with torch.inference_mode():
      (velocity,) = model(latents, time_, text, return_dict=False)
    return np.moveaxis(velocity.float().numpy(), 1, -1)

  return 0.0, step


if __name__ == "__main__":
  main()
