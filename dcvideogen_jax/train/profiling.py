"""Traces of chosen steps, to be seen with xprof or TensorBoard."""

import os
import re
import tempfile
from typing import Any

import jax

from dcvideogen_jax import errors, files


def parse(text: str, steps: int) -> range:
  """The steps that "10-12" or "10" names.

  Raises:
    errors.UserError: if it is neither, or not within a run of `steps`.
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

  Use as a context manager; leaving it ends a trace that was begun.
  """

  def __init__(self, directory: str | os.PathLike[str], steps: range):
    """Waits for the first of `steps`; there may be none."""
    self._directory = files.path(directory)
    self._steps = steps if jax.process_index() == 0 else range(0)
    # jax writes to this machine only.
    self._spool: tempfile.TemporaryDirectory | None = None
    self._running = False

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *exc: object) -> None:
    self._stop()

  def before(self, step: int, pending: Any) -> None:
    """Begins, if it is time; `pending` is what the step starts from."""
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
    """Ends after the last step, once `pending` is there; whether it did."""
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
