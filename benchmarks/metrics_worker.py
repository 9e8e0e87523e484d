"""Runs one side of `metrics.compare`, alone in its process.

  python -m benchmarks.metrics_worker < request.json

Writes a JSON object with the measurements as the last line of stdout.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks import processes

# From a clip and another to PSNR, SSIM and LPIPS of each frame, or their means.
Measure = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


def main() -> None:
  """Times the side that the request on stdin names."""
  request = json.load(sys.stdin)
  processes.pin(request["threads"])
  start = {"jax": _jax, "torch": _torch}[request["side"]]
  measure = start(request["weights"], request["threads"])
  count, *shape = request["shape"]
  values: dict[str, list[float]] = {"psnr": [], "ssim": [], "lpips": []}
  seconds, cpu = [], 0.0
  for i in range(count + 1):
    pair = clips(i, shape)
    wall, used = time.perf_counter(), time.process_time()
    found = measure(*pair)
    seconds.append(time.perf_counter() - wall)
    if i:
      cpu += time.process_time() - used
      for row, value in zip(values.values(), found, strict=True):
        row.append(float(np.mean(value)))
  measured = {
    "first_s": seconds[0],
    "seconds": seconds[1:],
    "cpu_s": cpu,
    "peak_bytes": processes.peak_bytes(),
    "values": values,
  }
  print(json.dumps(measured))


def clips(seed: int, shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns a clip of coloured patches, and the same with noise.

  Args:
    seed: of the noise.
    shape: frames, height and width.
  """
  frames, height, width = shape
  small = np.random.default_rng(0).integers(
    0, 256, (frames, -(-height // 8), -(-width // 8), 3), np.uint8
  )
  clip = small.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
  noise = np.random.default_rng(seed).integers(-9, 10, clip.shape, np.int16)
  return clip, np.clip(clip + noise, 0, 255).astype(np.uint8)


def _jax(weights: str, threads: int) -> Measure:
  del threads
  from dcvideogen_jax.eval import images, lpips, networks

  net = networks.load("lpips_alex", [weights])

  def measure(clip, other):
    distance = lpips.distance(net.module, net.variables, clip, other)
    return images.psnr(clip, other), images.ssim(clip, other), distance

  return measure


def _torch(weights: str, threads: int) -> Measure:
  import safetensors.torch
  import torch
  import torchmetrics.functional.image as metrics
  from lpips import LPIPS

  torch.set_num_threads(threads)
  module = LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
  state = module.state_dict()
  given = safetensors.torch.load_file(weights)
  # `lin0` and `lins.0` are the same module.
  given |= {
    name: given[f"lin{name.split('.', 2)[1]}.{name.split('.', 2)[2]}"]
    for name in state
    if name.startswith("lins.")
  }
  module.load_state_dict(state | given)

  def measure(clip, other):
    x, y = (
      torch.from_numpy(frames).permute(0, 3, 1, 2).float()
      for frames in (clip, other)
    )
    with torch.no_grad():
      psnr = metrics.peak_signal_noise_ratio(
        y, x, data_range=255.0, dim=(1, 2, 3), reduction="none"
      )
      ssim = metrics.structural_similarity_index_measure(y, x, data_range=255.0)
      distance = module(x / 255, y / 255, normalize=True)
    return psnr.numpy(), ssim.numpy(), distance.numpy()

  return measure


if __name__ == "__main__":
  main()
