"""Runs one side of `load.compare`, alone in its process.

  python -m benchmarks.load_worker < request.json

Writes a JSON object with the measurements as the last line of stdout.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks import processes

# Loads from a directory; yields the bits of each parameter as int16.
Load = Callable[[str], Iterator[np.ndarray]]


def main() -> None:
  """Times the side that the request on stdin names."""
  request = json.load(sys.stdin)
  load = {"jax": _jax, "torch": _torch}[request["side"]]()
  imported = processes.resident_bytes()
  start, cpu = time.perf_counter(), time.process_time()
  arrays = load(request["directory"])
  middle = time.perf_counter()
  checksum = 0
  for bits in arrays:
    checksum += int(bits.sum(dtype=np.int64))
  end = time.perf_counter()
  measured = {
    "load_s": middle - start,
    "read_s": end - middle,
    "cpu_s": time.process_time() - cpu,
    "grown_bytes": processes.peak_bytes() - imported,
    "checksum": checksum,
  }
  print(json.dumps(measured))


def _jax() -> Load:
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax import convert

  jax.block_until_ready(jnp.zeros(1))

  def load(directory):
    _, variables = convert.load("wan_dit", directory)
    leaves = jax.block_until_ready(jax.tree.leaves(variables))
    return (np.asarray(leaf).view(np.int16) for leaf in leaves)

  return load


def _torch() -> Load:
  import torch
  from diffusers import WanTransformer3DModel

  torch.zeros(1)

  def load(directory):
    module = WanTransformer3DModel.from_pretrained(
      directory, torch_dtype=torch.bfloat16
    )
    # diffusers keeps some parameters in float32.
    return (
      x.detach().to(torch.bfloat16).view(torch.int16).numpy()
      for x in module.parameters()
    )

  return load


if __name__ == "__main__":
  main()
