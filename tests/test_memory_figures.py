"""Figures of memory are in bytes and of this process."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dcvideogen_jax import memory

_PEAK = """
import sys
import numpy as np
from dcvideogen_jax import memory

before = memory.peak_rss()
held = np.ones(int(sys.argv[1]), np.uint8)
print(before, memory.peak_rss())
"""


def test_the_peak_grows_by_what_is_held():
  """Also where the process that starts the program has had more memory."""
  size = 2**29
  np.ones(2 * size, np.uint8)
  done = subprocess.run(
    [sys.executable, "-c", _PEAK, str(size)],
    check=True,
    capture_output=True,
    text=True,
  )
  before, after = map(int, done.stdout.split())
  assert after - before == pytest.approx(size, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_that_of_the_machine():
  lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
  rows = dict(line.split(":") for line in lines)
  assert memory.free() == pytest.approx(
    int(rows["MemAvailable"].split()[0]) * 1024, rel=0.2
  )
  total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  assert memory.free() < total
  assert memory.peak_device() is None  # On a CPU.
