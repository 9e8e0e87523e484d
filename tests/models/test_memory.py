"""A stream's memory does not grow with its length."""

import subprocess
import sys

import pytest

# Frames are generated on demand and decoded video is dropped at once, as in a
# program that reads and writes files.
_STREAM = """
import resource, sys
import jax, numpy as np
from dcvideogen_jax.models import bands, dc_ae_v, streaming
from tests import golden_data

frames, banded = int(sys.argv[1]), sys.argv[2] == "banded"
fields = {"cut": 2, "rows": 8, "offload": True} if banded else {}
plan = bands.BandPlan(**fields)
module = dc_ae_v.build(golden_data.SMALL)
variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 8, 3), "float32"))
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
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(frames, how):
  done = subprocess.run(
    [sys.executable, "-c", _STREAM, str(frames), how],
    check=True,
    capture_output=True,
    text=True,
  )
  return int(done.stdout)


@pytest.mark.parametrize(
  "how", ["banded", pytest.param("whole", marks=pytest.mark.slow)]
)
def test_peak_memory_does_not_grow_with_the_clip(how):
  """All 400 frames in float32 would be 123 MB more."""
  assert _peak(400, how) < 1.05 * _peak(80, how)
