"""Reports free and peak memory, and has freed memory returned."""

import contextlib
import ctypes
import functools
import os
import pathlib
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# Share of the free memory with which autoencoders are planned where no budget
# is given. The remainder is for cuDNN's workspaces and for fragmentation.
SHARE = 0.85

# Bytes of the smallest array that `return_large_arrays` is about, and glibc's
# number of that setting (`malloc.h`).
_LARGE = 2**20
_M_MMAP_THRESHOLD = -3
# Chunks of a video after which `bounded` calls `return_large_arrays`.
_SHORT = 2


def peak_rss() -> int:
  """Returns the peak host memory of this process so far, in bytes.

  On Linux `ru_maxrss` begins with the peak of the process that started this
  one, such as a notebook's, so it is read only where there is no /proc.
  """
  with contextlib.suppress(OSError, ValueError, IndexError):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def peak_device() -> int | None:
  """Returns the peak memory of the first device, in bytes; None on a CPU."""
  stats = jax.local_devices()[0].memory_stats()
  return stats and stats.get("peak_bytes_in_use")


def free() -> int:
  """Returns the free bytes of the first device or, on a CPU, of the host."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return free_on_host()


def free_on_host() -> int:
  """Returns the free bytes of the host's memory."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    text = pathlib.Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_on_all() -> int:
  """Returns the minimum of `free` over all processes, in bytes.

  All processes call this together, where they must make the same decision.
  """
  if jax.process_count() == 1:
    return free()
  # jax would cut int64 to 32 bits, so the number is gathered as float32.
  return int(multihost_utils.process_allgather(np.float32(free())).min())


@functools.cache
def return_large_arrays() -> None:
  """Has glibc return freed arrays of 1 MiB or more to the system, on a CPU.

  By default glibc keeps freed arrays of up to 32 MiB, once one of that size was
  freed, in an arena for each of XLA's threads. Which thread computes what
  changes from chunk to chunk, so that a stream would grow until every arena has
  held the most that any thread needs.

  The setting is the process's, and stays. One that the user made in the
  environment is kept. Nothing happens on a GPU or TPU, where XLA allocates
  elsewhere, nor where libc is not glibc.
  """
  user = os.environ.get("GLIBC_TUNABLES", "")
  if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in user:
    return
  if sys.platform == "linux" and jax.default_backend() == "cpu":
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
      mallopt(_M_MMAP_THRESHOLD, _LARGE)


def bounded(chunks: Iterable[T]) -> Iterator[T]:
  """Yields the chunks of a video, in memory that does not grow with them.

  From the third chunk on, freed arrays are returned as in
  `return_large_arrays`. A shorter video is decoded without, as fetching each
  array's pages from the system again costs time; a process that makes many
  short videos keeps at most what its threads have held at once.
  """
  for number, chunk in enumerate(chunks):
    if number == _SHORT:
      return_large_arrays()
    yield chunk


def trim() -> None:
  """Has glibc return what was freed; nothing happens where libc is another.

  Threads that come and go otherwise leave tens of MiB of freed memory.
  """
  if sys.platform == "linux":
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
      malloc_trim(0)
