"""Formats measurements as tables."""

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


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows as a Markdown table, with a column for each key.

  Args:
    rows: cells by column; floats get three digits, and a row may lack columns.
  """
  columns = [*dict.fromkeys(key for row in rows for key in row)]
  lines = [columns, ["---"] * len(columns)]
  lines += [[_cell(row.get(key, "")) for key in columns] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
  return str(value).replace("|", "\\|").replace("\n", " ")
