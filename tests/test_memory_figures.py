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


_FREED = """
import pathlib, sys
from dcvideogen_jax import memory


def rss():
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmRSS:")[1].split()[0]) * 1024


if sys.argv[1] == "set":
  memory.return_large_arrays()
bytearray(2**24)  # Freed at once: glibc then keeps arrays of that size.
held = [bytearray(b"x") * 2**21 for _ in range(50)]
last = bytearray(b"x") * (2**20 - 2**10)
before = rss()
held.clear()
print(before - rss())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  ("how", "environment", "share"),
  [
    ("set", {}, 1),
    ("not set", {}, 0),
    ("set", {"MALLOC_MMAP_THRESHOLD_": str(2**25)}, 0),
    ("set", {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**25}"}, 0),
  ],
)
def test_large_arrays_are_returned_once_freed(how, environment, share):
  """By itself glibc keeps them: `last` holds the end of its heap."""
  done = subprocess.run(
    [sys.executable, "-c", _FREED, how],
    env=os.environ | environment,
    check=True,
    capture_output=True,
    text=True,
  )
  assert int(done.stdout) / (50 * 2**21) == pytest.approx(share, abs=0.05)
