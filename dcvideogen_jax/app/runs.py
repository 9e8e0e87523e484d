"""Runs one piece of work after the other, and tells each tab how far it is."""

import collections
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dcvideogen_jax import errors, files, memory

# Seconds after which a tab is told again that it waits.
_PATIENCE = 0.2


class Cancelled(Exception):
  """The user has cancelled the run."""


class Waiting(NamedTuple):
  """Other runs come first; `ahead` counts them."""

  ahead: int


class Stage(NamedTuple):
  """A part of the work that does not count its progress."""

  text: str


class Progress(NamedTuple):
  """`done` of `total` of something, such as "step"."""

  what: str
  done: int
  total: int


class Shown(NamedTuple):
  """A video that can be looked at already, and its number of frames."""

  url: str
  done: int
  total: int


class Ended(NamedTuple):
  """The run is over.

  Attributes:
    result: of the work; None if it failed or was cancelled.
    problem: a sentence, or "" if it succeeded.
  """

  result: Any = None
  problem: str = ""


class Turns:
  """Lets one run after the other have the device, in the order they came."""

  def __init__(self):
    self._waiting: collections.deque[object] = collections.deque()
    self._changed = threading.Condition()

  def enter(self, run: "Run") -> None:
    """Waits for the turn of a run.

    Raises:
      Cancelled: if the run was cancelled meanwhile.
    """
    with self._changed:
      self._waiting.append(run)
      try:
        while (ahead := self._waiting.index(run)) > 0:
          run.tell(Waiting(ahead))
          self._changed.wait(_PATIENCE)
      except Cancelled:
        self._waiting.remove(run)
        raise

  def leave(self, run: "Run") -> None:
    """Ends the turn of a run."""
    with self._changed:
      if run in self._waiting:
        self._waiting.remove(run)
      self._changed.notify_all()


class Run:
  """A piece of work in a thread of its own."""

  def __init__(self, work: Callable[["Run"], Any], turns: Turns):
    """Starts the work once its turn comes.

    Args:
      work: called with this run, which it tells its progress.
      turns: shared with the other runs.
    """
    self.cancelled = False
    self._work, self._turns = work, turns
    self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._do, daemon=True)
    self._thread.start()

  def cancel(self) -> None:
    """Ends the run at its next sign of progress."""
    self.cancelled = True

  def tell(self, event: Any) -> None:
    """Tells progress.

    Raises:
      Cancelled: if the run was cancelled.
    """
    if self.cancelled:
      raise Cancelled
    self._events.put(event)

  def events(self) -> Iterator[Any]:
    """Yields what the work tells, the newest only, and `Ended` at last."""
    while True:
      event = self._events.get()
      while not isinstance(event, Ended) and not self._events.empty():
        event = self._events.get()
      yield event
      if isinstance(event, Ended):
        return

  def _do(self) -> None:
    try:
      self._turns.enter(self)
      try:
        ended = Ended(self._work(self))
      finally:
        self._turns.leave(self)
    except Cancelled:
      ended = Ended(problem="Cancelled. Nothing was kept.")
    except BaseException as e:
      ended = Ended(problem=told(e))
    self._work = None  # It refers to images and models.
    memory.trim()
    self._events.put(ended)


def told(error: BaseException) -> str:
  """Returns a sentence about an error; prints the traceback of a bug."""
  match error:
    case errors.UserError():
      return str(error)
    case MemoryError():
      return "The host is out of memory."
    case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
      first = str(error).splitlines()[0]
      return f"The device is out of memory: {first}"
    case OSError() if files.is_full(error):
      return f"The disk takes no more: {error.strerror or error}"
  traceback.print_exception(error)
  kind = type(error).__name__
  return f"A bug ({kind}: {error}). The terminal has the traceback."
