"""Which implementation is fastest where, read from measured.json.

The file holds, per JAX platform, rows of a `shape` [n, t, h, w, c, o] (t, h and
w of the result) and the milliseconds `ms` of a float32 forward call of each
implementation, as `python -m launch.benchmark --what=conv3d` writes them. A
platform without rows takes XLA's own convolution.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence

FILE = pathlib.Path(__file__).with_name("measured.json")

# Compiling a form takes about so many seconds, in which a program that runs
# `CALLS` times must not be slower than with a simpler one.
COMPILE_S = {"xla": 0.1, "channels": 0.2, "outputs": 0.2, "winograd": 1.2}
CALLS = 1000


@functools.cache
def table() -> dict[str, list[dict]]:
  """Platform -> rows."""
  return json.loads(FILE.read_text())["platforms"]


def ranking(platform: str, shape: Sequence[int]) -> list[str]:
  """Implementations for a shape as in measured.json, best first.

  The milliseconds are those of the nearest row, in proportion to the work.
  """
  rows = table().get(platform)
  if not rows:
    return ["xla"]
  nearest = min(
    rows, key=lambda row: math.dist(_logs(row["shape"]), _logs(shape))
  )
  scale = math.prod(shape) / math.prod(nearest["shape"])
  cost = {
    name: ms * scale + 1000 * COMPILE_S[name] / CALLS
    for name, ms in nearest["ms"].items()
  }
  return sorted(cost, key=cost.__getitem__)


def _logs(shape):
  """Positions, c and o in doublings."""
  *positions, c, o = shape
  return [math.log2(v) for v in (math.prod(positions), c, o)]
