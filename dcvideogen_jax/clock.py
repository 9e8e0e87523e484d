"""Measures how much time a program spends in each of its phases."""

import collections
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from dcvideogen_jax import memory

T = TypeVar("T")

# jax's events of lowering to MLIR, and of XLA's compilation or the retrieval
# from its cache.
_COMPILATION = (
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Clock:
  """Counts seconds of wall time per phase; every moment belongs to one phase.

  A phase that is entered inside another one interrupts it. The time of XLA's
  compilation counts as "compile", in whatever phase it happens. Time outside
  all phases counts as "other".

  Attributes:
    seconds: wall time by the name of the phase.
  """

  def __init__(self):
    self.seconds: dict[str, float] = collections.defaultdict(float)
    self._phases = ["other"]
    self._since = time.perf_counter()
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time of the `with` body as that of a phase."""
    self._charge()
    self._phases.append(name)
    try:
      yield
    finally:
      self._charge()
      self._phases.pop()

  def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
    """Yields the items; the time to produce them counts as that of a phase."""
    iterator = iter(items)
    done = object()
    while True:
      with self.phase(name):
        item = next(iterator, done)
      if item is done:
        return
      yield item

  def report(self) -> dict[str, float]:
    """Returns seconds by phase, rounded to milliseconds, and their "total"."""
    self._charge()
    seconds = {name: round(s, 3) for name, s in sorted(self.seconds.items())}
    return {**seconds, "total": round(sum(self.seconds.values()), 3)}

  def restart(self, keep: str) -> None:
    """Resets the seconds of all phases except the phase `keep`."""
    self._charge()
    kept = self.seconds[keep]
    self.seconds.clear()
    self.seconds[keep] = kept

  def _charge(self) -> None:
    now = time.perf_counter()
    self.seconds[self._phases[-1]] += now - self._since
    self._since = now

  def _on_event(self, event: str, duration: float, **kwargs) -> None:
    del kwargs
    if event in _COMPILATION:
      self.seconds["compile"] += duration
      self.seconds[self._phases[-1]] -= duration


def arrival(frames: int, since: float) -> dict[str, Any]:
  """Returns the time and the peak memory at which frames of a video are ready.

  Args:
    frames: number of frames so far.
    since: value of `time.perf_counter` when the first frame was asked for.
  """
  return {
    "frames": frames,
    "seconds": round(time.perf_counter() - since, 3),
    "peak_rss_bytes": memory.peak_rss(),
    "peak_device_bytes": memory.peak_device(),
  }


def told(seconds: Mapping[str, float]) -> str:
  """Formats a clock's report for people: "3.1 s (decode 1.0, load 2.1)"."""
  phases = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total")
  return f"{seconds['total']:.1f} s ({phases})"
