"""Ranks the implementations of conv3d by the times in measured.json.

The file holds rows for each JAX platform. A row has a `shape`
[n, t, h, w, c, o], with t, h and w of the result, and `ms`, the milliseconds of
a float32 forward call of each implementation. `python -m launch.benchmark
--what=conv3d` writes such rows. A platform without rows takes XLA's own
convolution.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence

FILE = pathlib.Path(__file__).with_name("measured.json")

# Approximate compile time of each implementation in seconds, amortised over
# `CALLS` calls in the ranking.
COMPILE_S = {"xla": 0.1, "channels": 0.2, "outputs": 0.2, "winograd": 1.2}
CALLS = 1000


@functools.cache
def table() -> dict[str, list[dict]]:
  """Returns platform -> measured rows."""
  return json.loads(FILE.read_text())["platforms"]


def ranking(platform: str, shape: Sequence[int]) -> list[str]:
  """Returns the implementations for a shape, fastest first.

  The times are those of the row with the nearest shape, scaled by the work.

  Args:
    platform: "cpu", "gpu" or "tpu".
    shape: [n, t, h, w, c, o], as in measured.json.
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
  """Returns log2 of the number of positions, of c and of o."""
  *positions, c, o = shape
  return [math.log2(v) for v in (math.prod(positions), c, o)]
