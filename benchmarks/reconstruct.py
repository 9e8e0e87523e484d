"""Encodes and decodes one clip in JAX and in plain PyTorch, side by side."""

import json
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import processes, tables
from dcvideogen_jax import errors
from dcvideogen_jax.convert import api, naming

SIDES = ("jax", "torch")


def compare(
  config: Mapping[str, Any],
  clip: tuple[int, int, int, int],
  sides: Sequence[str] = SIDES,
  threads: int = 2,
  repeats: int = 1,
) -> dict[str, Any]:
  """Runs every side in its own process on the same random weights and clip.

  Float32 on the CPU.

  Args:
    config: of DC-AE-V, `convert`'s kind "dc_ae_v".
    clip: b, t, h, w of the video; whole chunks and latents.
    sides: out of `SIDES`, run in this order.
    threads: cores that a process may use.
    repeats: of encoding and decoding; the first run is one of them.

  Returns:
    A JSON object: what was run; `sides`, by name, with seconds (`load_s`,
    `compile_s`, and per repeat `encode_s` and `decode_s`) and bytes of peak
    resident memory once loaded and at the end; `difference`, if there are two
    sides, with the largest absolute difference and value of latents and video.

  Raises:
    errors.UserError: if the clip does not fill chunks and latents, or a side's
      process fails.
  """
  shape = (*clip, 3)
  request = {
    "config": {**config},
    "clip": shape,
    "shapes": _shapes(config, shape),
    "threads": threads,
    "repeats": repeats,
  }
  report = {
    "clip": [*clip],
    "config": json.loads(json.dumps(config)),
    "threads": threads,
    "machine": platform.machine(),
    "jax": jax.__version__,
    "sides": {},
  }
  with tempfile.TemporaryDirectory() as folder:
    outputs = {}
    for side in sides:
      path = pathlib.Path(folder) / f"{side}.npz"
      report["sides"][side] = processes.run(
        "benchmarks.worker",
        {**request, "side": side, "outputs": str(path)},
      )
      with np.load(path) as file:
        outputs[side] = {**file}
  if len(sides) == 2:
    a, b = outputs.values()
    report["difference"] = {
      name: {
        "max_abs": float(np.abs(a[name] - b[name]).max()),
        "largest": float(np.abs(a[name]).max()),
      }
      for name in a
    }
  return report


def table(report: Mapping[str, Any]) -> str:
  """The report as text, with the ratio of the first side to the second."""
  rows = [
    ("compile, s", lambda side: side["compile_s"]),
    ("encode, s", lambda side: statistics.median(side["encode_s"])),
    ("decode, s", lambda side: statistics.median(side["decode_s"])),
    ("memory loaded, GiB", lambda side: side["loaded_bytes"] / 2**30),
    ("peak memory, GiB", lambda side: side["peak_bytes"] / 2**30),
  ]
  lines = tables.lines(report["sides"], rows)
  for name, d in report.get("difference", {}).items():
    lines.append(
      f"{name}: max abs difference {d['max_abs']:.2e}"
      f" of values up to {d['largest']:.2f}"
    )
  return "\n".join(lines)


def _shapes(config, clip):
  """Official name -> shape of every weight."""
  kind = api.KINDS["dc_ae_v"]
  module = kind.build(config)
  size = module.spatial_factor
  multiples = (1, module.frames_multiple, size, size, 3)
  if any(n < 1 or n % m for n, m in zip(clip, multiples, strict=True)):
    raise errors.UserError(
      f"the clip must have a multiple of {module.frames_multiple} frames and of"
      f" {size} rows and columns, found {tuple(clip)}"
    )
  video = jax.ShapeDtypeStruct(clip, jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), video)
  return naming.torch_shapes(api.rules_of("dc_ae_v", None), variables["params"])
