"""Says how two tables of shapes differ, in a message that people can read."""

import re
from collections.abc import Mapping

from dcvideogen_jax import errors

Shape = tuple[int, ...]

# Maximum lines of a message per kind of difference; further ones are counted.
_LINES = 30


def require_equal(
  expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str
) -> None:
  """Raises one error that lists every difference, if names or shapes differ.

  Names that only differ in their numbers, and lack or have the same shape,
  share a line.

  Args:
    expected: name -> required shape.
    found: name -> actual shape.
    what: describes the object with the shapes `found`, for the message.

  Raises:
    errors.UserError: if names or shapes differ.
  """
  if count := number_of(expected, found):
    raise errors.UserError(
      f"{what} does not fit ({count} differences): {tell(expected, found)}"
    )


def number_of(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> int:
  """Returns how many names are missing, unexpected or of another shape."""
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
  """Lists the differences: missing names, unexpected names, other shapes.

  Args:
    expected: name -> required shape.
    found: name -> actual shape.
    most: maximum number of items per kind; further names are counted.
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
  """Joins names that differ in their numbers; of many, the first and last."""
  shown = [errors.brief(name) for name in names]
  if len(names) < 4:
    return ", ".join(shown)
  return f"{shown[0]} ... {shown[-1]} ({len(names)} names)"
