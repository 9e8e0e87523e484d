"""Replaces clips that cannot be read by others, counts them and names them.

The replacement depends only on the number of the element, so that a training
that is resumed sees the same clips. Grain cannot replace elements: after an
exception in a transform its threads continue, and the iterator ends later with
another error.
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
_TRIES = 100  # Most clips that are tried for one element.
_LISTED = 20  # Most items that a message lists.


class Skipped:
  """Counts the clips that could not be read, by file. Safe across threads."""

  def __init__(self):
    self._lock = threading.Lock()
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, name: str, reason: str) -> None:
    """Counts a clip, and warns of the first clip of a file.

    Args:
      name: name of the file.
      reason: why the clip cannot be read.
    """
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
    """Warns with a list of all files so far, and resets the counts."""
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
  """Joins the first items, and adds how many more there are."""
  more = len(items) - _LISTED
  return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def candidates(numbers: Sequence[_T], place: int) -> list[_T]:
  """Returns up to a hundred numbers, from `place` on and around the end."""
  count = min(len(numbers), _TRIES)
  return [numbers[(place + i) % len(numbers)] for i in range(count)]


def first(
  found: Sequence[_T],
  read: Callable[[_T, np.random.Generator], Any],
  name: Callable[[_T], str],
  rng: np.random.Generator,
  skipped: Skipped,
) -> Any:
  """Reads the first candidate that can be read.

  Args:
    found: the candidates, as `candidates` returns them; the first is the clip
      that is wanted, and the others may replace it.
    read: reads a candidate, with a random generator.
    name: returns the name of a candidate for messages.
    rng: generator for the first candidate. Each later candidate gets its own
      generator, which does not depend on how much was drawn from this one.
    skipped: records the candidates that cannot be read.

  Raises:
    errors.UserError: if no candidate can be read.
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
    """Returns the position of the next batch."""
    return self._parent.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues at the position that `get_state` returned."""
    self._parent.set_state(state)

  def close(self) -> None:
    """Closes the iterator, and lists the skipped clips the first time."""
    closed = self._closed
    super().close()
    if not closed:
      self._skipped.tell()
