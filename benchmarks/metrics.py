"""Times PSNR, SSIM and LPIPS beside the packages torchmetrics and lpips.

The side of PyTorch needs torchmetrics, lpips and torchvision, which nothing
else here does: pip install torchmetrics lpips torchvision
"""

import os
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from benchmarks import processes, tables
from dcvideogen_jax import errors
from dcvideogen_jax.convert import engine
from dcvideogen_jax.convert import lpips as lpips_table
from dcvideogen_jax.models import lpips

SIDES = ("jax", "torch")
# Largest differences between the sides that rounding explains.
_CLOSE = {"psnr": 1e-3, "ssim": 1e-4, "lpips": 1e-4}


def compare(
  shape: tuple[int, int, int, int],
  sides: Sequence[str] = SIDES,
  threads: int = 2,
) -> dict[str, Any]:
  """Measures clips on each side, one clip at a time, alone in its process.

  Clips and AlexNet's weights are random, and the same on both sides. A first
  clip, which compiles, is not among the others.

  Args:
    shape: clips, frames of a clip, height and width.
    sides: names of `SIDES`, run in this order.
    threads: CPU cores.

  Returns:
    A JSON object with the settings and `sides`, by name, with lists of seconds
    by clip (`seconds`), `first_s` of the clip before, `cpu_s` of all clips,
    `peak_bytes` (resident) and `values`, the means of each clip.

  Raises:
    errors.UserError: if the process of a side fails, or the sides give
      different values.
  """
  measured = {}
  with tempfile.TemporaryDirectory() as folder:
    weights = pathlib.Path(folder) / "alex.safetensors"
    _write(weights)
    for side in sides:
      measured[side] = processes.run(
        "benchmarks.metrics_worker",
        {
          "side": side,
          "shape": shape,
          "threads": threads,
          "weights": str(weights),
        },
      )
  _check(measured)
  return {
    "clips": [*shape],
    "threads": threads,
    "load_average": os.getloadavg()[0],
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    "jax": jax.__version__,
    "sides": measured,
  }


def _write(path: pathlib.Path) -> None:
  """Writes random weights of LPIPS with AlexNet as the lpips package has it."""
  module = lpips.LPIPS("alex")
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image, image)
  rng = np.random.default_rng(0)

  def draw(leaf):
    scale = max(1, int(np.prod(leaf.shape[:-1]))) ** -0.5
    # The linear layers of LPIPS are not negative.
    return abs(scale * rng.normal(size=leaf.shape)).astype(np.float32)

  rules = lpips_table.layouts("alex")["lpips"]
  tensors = engine.torch_tensors(rules, jax.tree.map(draw, shapes["params"]))
  arrays = {name: np.asarray(x.read()) for name, x in tensors.items()}
  safetensors.numpy.save_file(arrays, path)


def _check(measured: Mapping[str, Any]) -> None:
  for name, close in _CLOSE.items():
    values = [side["values"][name] for side in measured.values()]
    if np.ptp(values, axis=0).max() > close:
      raise errors.UserError(f"the sides give different {name}: {values}")


def table(report: Mapping[str, Any]) -> str:
  """Formats the report with the ratio of the first side to the second."""
  clips = report["clips"]
  rows = [
    ("a clip, s", lambda side: statistics.mean(side["seconds"])),
    ("a clip, CPU s", lambda side: side["cpu_s"] / clips[0]),
    ("first clip, s", lambda side: side["first_s"]),
    ("peak memory, MiB", lambda side: side["peak_bytes"] / 2**20),
  ]
  lines = tables.lines(report["sides"], rows)
  told = "x".join(map(str, clips[1:]))
  return "\n".join(
    [
      *lines,
      f"{clips[0]} clips of {told}, PSNR, SSIM and LPIPS with AlexNet, load"
      f" {report['load_average']:.1f}",
    ]
  )
