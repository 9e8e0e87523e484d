"""Clips that cannot be read are replaced by others, counted and named.

Which clip takes the place of which depends on nothing but the number of the
element, so that a training that is started again sees the same ones. Grain
cannot do it: after an exception in a transform its threads go on, and the
iterator ends later in another error.
"""

import collections
import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from dcvideogen_jax import errors

_T = TypeVar("_T")
_TRIES = 100
_LISTED = 20


class Skipped:
  """What could not be read so far; several threads may tell."""

  def __init__(self):
    self._lock = threading.Lock()
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, name: str, reason: str) -> None:
    """Counts a clip; the first of a file is told."""
    with self._lock:
      self._counts[name] += 1
      first = self._counts[name] == 1
    if first:
      warnings.warn(
        f"a clip of {name} is left out, and another takes its place: "
        f"{reason.replace(name, 'it')}",
        stacklevel=3,
      )

  def tell(self) -> None:
    """Lists the files once more, if there are any."""
    with self._lock:
      counts, self._counts = self._counts, collections.Counter()
    if counts:
      names = [f"{name} ({n})" for name, n in counts.most_common()]
      warnings.warn(
        f"{counts.total()} clips of {len(counts)} videos were left out: "
        f"{listed(names)}",
        stacklevel=3,
      )


def listed(items: Sequence[str]) -> str:
  """The first of many, and how many more there are."""
  more = len(items) - _LISTED
  return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def candidates(numbers: Sequence[_T], place: int) -> list[_T]:
  """The one at a place and those after it, the first after the last."""
  count = min(len(numbers), _TRIES)
  return [numbers[(place + i) % len(numbers)] for i in range(count)]


def first(
  found: Sequence[_T],
  read: Callable[[_T, np.random.Generator], Any],
  name: Callable[[_T], str],
  rng: np.random.Generator,
  skipped: Skipped,
) -> Any:
  """What is read of the first candidate that can be read.

  Args:
    found: as of `candidates`; the first is the one that is wanted.
    read: of a candidate and a generator.
    name: of a candidate, for people.
    rng: is given to the first; later ones each get one of their own, however
      much was drawn from this one.
    skipped: is told of those that cannot be read.

  Raises:
    errors.UserError: if none can be read.
  """
  spare = copy.deepcopy(rng)
  seed = int(spare.integers(2**63))
  reason = ""
  for number, candidate in enumerate(found):
    if number:
      rng = np.random.default_rng((seed, number))
    try:
      return read(candidate, rng)
    except errors.UserError as e:
      reason = reason or f"{name(candidate)}: {e}"
      skipped.add(name(candidate), str(e))
  raise errors.UserError(
    f"none of {len(found)} videos, one after another, can be read, such as "
    f"{reason}"
  )


class Telling(grain.DatasetIterator):
  """An iterator that lists what was skipped when it is closed."""

  def __init__(self, parent: grain.DatasetIterator, skipped: Skipped):
    super().__init__(parent)
    self._skipped = skipped

  def __next__(self) -> Any:
    return next(self._parent)

  def get_state(self) -> dict[str, Any]:
    return self._parent.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._parent.set_state(state)

  def close(self) -> None:
    closed = self._closed
    super().close()
    if not closed:
      self._skipped.tell()
