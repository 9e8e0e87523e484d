"""Runs one side of `sides.compare`, alone in its process.

  python -m benchmarks.worker < request.json

Writes the outputs to the request's `outputs` (.npz) and a JSON object with the
measurements as the last line of stdout.
"""

import importlib
import json
import sys
import time

import numpy as np

from benchmarks import processes, products


def main() -> None:
  """Times the side that the request on stdin names."""
  request = json.load(sys.stdin)
  processes.pin(request["threads"])
  if request["side"] == "torch":
    import torch

    torch.set_num_threads(request["threads"])
  task = importlib.import_module(f"benchmarks.tasks.{request['task']}")
  start = time.perf_counter()
  side = getattr(task, request["side"])(request)
  measured = {
    "load_s": time.perf_counter() - start - side.compile_s,
    "compile_s": side.compile_s,
    "loaded_bytes": processes.resident_bytes(),
  }
  calls = {name: {"s": [], "core_s": []} for name in side.calls}
  outputs = {}
  for number in range(request["repeats"] + request["warm_up"]):
    for name, call in side.calls.items():
      start, core_start = time.perf_counter(), time.process_time()
      outputs[name] = call()
      if number >= request["warm_up"]:
        calls[name]["s"].append(time.perf_counter() - start)
        calls[name]["core_s"].append(time.process_time() - core_start)
  measured |= {"calls": calls, "peak_bytes": processes.peak_bytes()}
  # What follows takes memory that is not the task's.
  measured["flops"] = side.flops()
  measured["product_rate"] = products.rate(
    request["side"], request.get("dtype", "float32")
  )
  np.savez(request["outputs"], **outputs)
  print(json.dumps(measured))


if __name__ == "__main__":
  main()
