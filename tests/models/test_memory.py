"""A stream's memory does not grow with its length."""

import os
import subprocess
import sys

import pytest

from tests import compiling

# Frames are generated on demand and decoded video is dropped at once, as in a
# program that reads and writes files.
_STREAM = '''
import pathlib, sys
import jax, numpy as np
from dcvideogen_jax import memory
from dcvideogen_jax.models import bands, dc_ae_v, streaming
from tests import golden_data, random_weights

fields = {"cut": 2, "rows": 8, "offload": True}
plan = bands.BandPlan(**(fields if sys.argv[1] == "banded" else {}))
module = dc_ae_v.build(golden_data.SMALL)
shape = jax.ShapeDtypeStruct((1, 8, 8, 8, 3), "float32")
variables = random_weights.of(module, shape)


def peak(frames):
  """Measures this call alone: compiling takes more than streaming."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  rng = np.random.default_rng(0)
  video = (
    rng.integers(0, 256, (1, 4, 160, 160, 3), "uint8")
    for _ in range(frames // 4)
  )
  latents = streaming.encode(module, variables, video, plan=plan)
  count = sum(
    chunk.shape[1]
    for chunk in streaming.decode(module, variables, latents, plan=plan)
  )
  assert count == frames
  # A process inherits `ru_maxrss` from its parent, which runs the tests and has
  # taken more memory than a stream does.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0])


peak(16)
print(peak(80), peak(400))
# Without this a process grows by chance, with what its threads happen to do.
assert memory.return_large_arrays.cache_info().currsize
'''


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  "how", ["banded", pytest.param("whole", marks=pytest.mark.slow)]
)
def test_peak_memory_does_not_grow_with_the_clip(how):
  """All 400 frames in float32 would be 123 MB more."""
  done = subprocess.run(
    [sys.executable, "-c", _STREAM, how],
    # One device: eight have more memory in use at once.
    env=os.environ | {"XLA_FLAGS": compiling.FLAGS},
    check=True,
    capture_output=True,
    text=True,
  )
  short, long = map(int, done.stdout.split())
  assert long < 1.05 * short
