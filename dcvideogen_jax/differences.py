"""Tells how two tables of shapes differ, in a message that people can read."""

import re
from collections.abc import Mapping

from dcvideogen_jax import errors

Shape = tuple[int, ...]

# Lines of a message about each kind of difference; the rest are counted.
_LINES = 30


def require_equal(
  expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str
) -> None:
  """Raises one `errors.UserError` that tells every difference, or returns None.

  Names that differ in numbers only, and in the same way, share a line.

  Args:
    expected: name -> shape that is needed.
    found: name -> shape that is there.
    what: names what was looked at, for the message.
  """
  if count := number_of(expected, found):
    raise errors.UserError(
      f"{what} does not fit ({count} differences): {tell(expected, found)}"
    )


def number_of(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> int:
  """How many names are missing, unexpected or of another shape."""
  wrong = sum(
    tuple(expected[name]) != tuple(found[name])
    for name in expected.keys() & found.keys()
  )
  return len(expected.keys() ^ found.keys()) + wrong


def tell(
  expected: Mapping[str, Shape],
  found: Mapping[str, Shape],
  most: int = _LINES,
) -> str:
  """The differences: names missing first, then unexpected, then misshapen.

  Args:
    expected: name -> shape that is needed.
    found: name -> shape that is there.
    most: how many lines to tell of each kind; the rest is counted.
  """
  kinds: dict[str, dict[tuple[str, str], list[str]]] = {}

  def add(kind, name, detail):
    key = (re.sub(r"\d+", "*", name), detail)
    kinds.setdefault(kind, {}).setdefault(key, []).append(name)

  for name, shape in expected.items():
    if name not in found:
      add("missing", name, f" {tuple(shape)}")
  for name, shape in found.items():
    if name not in expected:
      add("unexpected", name, f" {tuple(shape)}")
  for name, shape in expected.items():
    if name in found and tuple(shape) != tuple(found[name]):
      detail = f": expected {tuple(shape)}, found {tuple(found[name])}"
      add("shape of", name, detail)
  told = []
  for kind, groups in kinds.items():
    for (_, detail), names in [*groups.items()][:most]:
      told.append(f"{kind} {_together(names)}{detail}")
    if rest := sum(len(names) for names in [*groups.values()][most:]):
      told.append(f"{kind} {rest} more")
  return "; ".join(told)


def _together(names: list[str]) -> str:
  """Names that differ in their numbers, as one."""
  shown = [errors.brief(name) for name in names]
  if len(names) < 4:
    return ", ".join(shown)
  return f"{shown[0]} ... {shown[-1]} ({len(names)} names)"
