"""Formats the measurements of one or two sides."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lines(
  sides: Mapping[str, Any],
  rows: Sequence[tuple[str, Callable[[Any], float]]],
) -> list[str]:
  """Formats a line per row, with the ratio of the first side to the second.

  Args:
    sides: measurements by the side's name.
    rows: a label, and a function that takes its value from a side's
      measurements.
  """
  cells = [("", *sides, "ratio" if len(sides) == 2 else "")]
  for label, value in rows:
    values = [value(side) for side in sides.values()]
    two = len(values) == 2 and values[1]
    ratio = f"{values[0] / values[1]:.2f}" if two else ""
    cells.append((label, *(f"{v:.2f}" for v in values), ratio))
  return [
    f"{row[0]:<20}" + "".join(f"{cell:>10}" for cell in row[1:]).rstrip()
    for row in cells
  ]
