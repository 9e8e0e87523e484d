"""SIGTERM, as a question that the loop asks after each step."""

import contextlib
import signal

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """A context in which SIGTERM waits to be asked for.

  Several processes get the same answer at the same step. There jax's
  coordination service receives the signal, if it was started before.
  """

  def __init__(self):
    self._received = False
    self._alone = jax.process_count() == 1

  def __enter__(self) -> "Interrupt":
    # Only the main thread may set handlers; elsewhere the default stays.
    with contextlib.suppress(ValueError):
      if self._alone:
        self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    with contextlib.suppress(ValueError, AttributeError):
      signal.signal(signal.SIGTERM, self._previous)

  def received(self, step: int) -> bool:
    """Whether to save and stop now; to be asked once after every step."""
    if self._alone:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)

  def _handle(self, *args: object) -> None:
    self._received = True
