"""Figures of memory are in bytes and of this process."""

from dcvideogen_jax import memory


def test_memory_is_in_bytes():
  assert 10**7 < memory.peak_rss() < 10**12
  assert 10**7 < memory.free() < 10**15
  assert memory.peak_device() is None  # On a CPU.
