"""Times encoding and decoding one clip in JAX and in plain PyTorch."""

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
  """Runs each side in its own process on the same random weights and clip.

  Both compute in float32 on the CPU.

  Args:
    config: fields of DC-AE-V, `convert`'s kind "dc_ae_v".
    clip: b, t, h, w of the video; frames fill whole chunks, and height and
      width are multiples of the spatial factor.
    sides: names of `SIDES`, run in this order.
    threads: number of cores that a process may use.
    repeats: number of timed runs; the first run counts too.

  Returns:
    A JSON object with the settings; `sides`, by name, with seconds (`load_s`;
    `compile_s`; for each repeat `encode_s` and `decode_s`) and peak resident
    memory in bytes (`loaded_bytes` before the first run, `peak_bytes` at the
    end); and with two sides `difference`: the largest absolute difference and
    the largest absolute value of latents and video.

  Raises:
    errors.UserError: if the size of the clip does not fit, or the process of a
      side fails.
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
  """Formats the report with the ratio of the first side to the second."""
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
  """Returns the shape of every weight by its official name."""
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
