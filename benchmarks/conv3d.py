"""Times every implementation of conv3d, for `ops/conv3d/measured.json`."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import tables
from dcvideogen_jax.ops import conv3d
from dcvideogen_jax.ops.conv3d import measured

# n, t, h, w, c, o: batch, frames, height, width, input and output channels.
# First the convolutions of DC-AE-V f32t4c32 on 128x128 pixels, large ones with
# 10 of the 40 frames; then those of a tiny autoencoder in training.
SHAPES = (
  (1, 10, 128, 128, 3, 64),
  (1, 10, 64, 64, 256, 12),
  (1, 10, 64, 64, 256, 128),
  (1, 10, 64, 64, 256, 256),
  (1, 10, 32, 32, 512, 128),
  (1, 10, 32, 32, 512, 512),
  (1, 10, 32, 32, 512, 1024),
  (1, 40, 16, 16, 512, 256),
  (1, 40, 16, 16, 512, 512),
  (1, 40, 16, 16, 512, 2048),
  (1, 40, 8, 8, 1024, 256),
  (1, 40, 8, 8, 1024, 1024),
  (1, 40, 8, 8, 1024, 2048),
  (1, 40, 4, 4, 1024, 256),
  (1, 40, 4, 4, 1024, 1024),
  (1, 40, 4, 4, 1024, 4096),
  (1, 10, 4, 4, 1024, 32),
  (1, 10, 4, 4, 32, 1024),
  (1, 10, 4, 4, 1024, 1024),
  (1, 10, 4, 4, 1024, 4096),
  (4, 16, 64, 64, 3, 4),
  (4, 16, 32, 32, 16, 12),
  (4, 16, 32, 32, 16, 16),
  (4, 16, 16, 16, 32, 32),
  (4, 16, 16, 16, 96, 96),
  (4, 16, 8, 8, 64, 64),
  (4, 16, 4, 4, 64, 64),
  (4, 16, 2, 2, 64, 64),
  (4, 4, 2, 2, 64, 64),
)


def measure(shape: Sequence[int], repeats: int) -> dict[str, Any]:
  """Times the forward pass of every implementation, in turns.

  The convolution is in float32, with a 3x3x3 kernel and "same" padding.

  Args:
    shape: n, t, h, w, c, o, as in `SHAPES`.
    repeats: calls of each implementation, of which the median is taken.

  Returns:
    A row of measured.json: "shape", and "ms", milliseconds by implementation.
  """
  *x, o = shape
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], x)
  kernel = jax.random.normal(keys[1], (3, 3, 3, x.shape[-1], o))

  def compiled(name):
    def run(x, kernel):
      return conv3d.conv3d(
        x, kernel, padding=((1, 1),) * 3, implementation=name
      )

    return jax.jit(run).lower(x, kernel).compile()

  forms = {name: compiled(name) for name in measured.COMPILE_S}
  seconds = {name: [] for name in forms}
  for _ in range(repeats):
    for name, form in forms.items():
      start = time.perf_counter()
      form(x, kernel).block_until_ready()
      seconds[name].append(time.perf_counter() - start)
  ms = {
    name: float(f"{1000 * statistics.median(s):.3g}")
    for name, s in seconds.items()
  }
  return {"shape": [*shape], "ms": ms}


def dumps(platforms: dict[str, list[dict[str, Any]]]) -> str:
  """Formats measured.json with one row per line.

  Args:
    platforms: rows of `measure`, by platform ("cpu", "gpu", "tpu").
  """
  blocks = []
  for name, rows in platforms.items():
    lines = ",\n    ".join(map(json.dumps, rows))
    blocks.append(f'  "{name}": [\n    {lines}\n  ]')
  return '{"platforms": {\n' + ",\n".join(blocks) + "\n}}\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats GFLOP/s, counting the FLOPs of the direct convolution."""
  return tables.markdown(
    [
      {
        "n, t, h, w, c, o": ", ".join(map(str, row["shape"])),
        **{
          name: f"{2 * 27 * math.prod(row['shape']) / 1e6 / ms:.1f}"
          for name, ms in row["ms"].items()
        },
      }
      for row in rows
    ]
  )
