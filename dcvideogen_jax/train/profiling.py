"""Profiler traces of chosen steps, for xprof or TensorBoard."""

import os
import re
import tempfile
from typing import Any

import jax

from dcvideogen_jax import errors, files


def parse(text: str, steps: int) -> range:
  """Parses the steps that "10-12" or "10" names.

  Raises:
    errors.UserError: if `text` has neither form, or names steps outside a run
      of `steps`.
  """
  found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
  first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
  if not 1 <= first <= last <= steps:
    raise errors.UserError(
      f"steps to profile must be FIRST-LAST within 1-{steps}, such as 10-12,"
      f" found {text!r}"
    )
  return range(first, last + 1)


class Trace:
  """Profiles chosen steps, in process 0, into a directory.

  Use as a context manager; leaving it ends a running trace.
  """

  def __init__(self, directory: str | os.PathLike[str], steps: range):
    """Prepares the trace of `steps`, which may be an empty range."""
    self._directory = files.path(directory)
    self._steps = steps if jax.process_index() == 0 else range(0)
    # jax writes traces to local disks only: remote ones are uploaded from here.
    self._spool: tempfile.TemporaryDirectory | None = None
    self._running = False

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *exc: object) -> None:
    self._stop()

  def before(self, step: int, pending: Any) -> None:
    """Starts the trace if `step` is its first, once `pending` is computed.

    Args:
      step: the step that comes next.
      pending: arrays from which that step starts.
    """
    if self._running or step not in self._steps:
      return
    jax.block_until_ready(pending)
    where = os.fspath(self._directory)
    if files.is_remote(where):
      self._spool = tempfile.TemporaryDirectory()
      where = self._spool.name
    jax.profiler.start_trace(where)
    self._running = True

  def after(self, step: int, pending: Any) -> bool:
    """Ends the trace if `step` is its last, once `pending` is computed.

    Args:
      step: the step that was dispatched last.
      pending: arrays which that step returned.

    Returns:
      Whether the trace ended now.
    """
    if not self._running or step + 1 in self._steps:
      return False
    jax.block_until_ready(pending)
    self._stop()
    return True

  def _stop(self) -> None:
    if not self._running:
      return
    self._running = False
    jax.profiler.stop_trace()
    if self._spool:
      files.upload(self._spool.name, self._directory)
      self._spool.cleanup()
