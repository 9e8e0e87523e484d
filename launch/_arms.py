"""What the arms of the ablation have come to: curves, a table, a picture."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from dcvideogen_jax import files
from launch import _family

METRIC = "semantic/all"


def write(work: pathlib.Path, seeds: Sequence[str]) -> str:
  """Writes results.json, table.md and curves.png under ablation/.

  Args:
    work: folder of the chain, in which all arms are done.
    seeds: of the arms.

  Returns:
    The table.
  """
  curves = {
    arm: [curve(work, arm, seed) for seed in seeds] for arm in _family.ARMS
  }
  base = _base(work)
  output = files.make_directory(work / "ablation")
  results: dict[str, Any] = {"metric": METRIC, "base": base, "curves": curves}
  for name, text in (
    ("results.json", json.dumps(results, indent=1) + "\n"),
    ("table.md", table(curves, base)),
  ):
    with files.atomic(output / name) as temporary:
      temporary.write_text(text)
  plot(curves, base, output / "curves.png")
  return table(curves, base)


def curve(work: pathlib.Path, arm: str, seed: str) -> list[tuple[int, float]]:
  """(steps of all phases so far, accuracy) of one arm's run."""
  points, before = [], 0
  for phase, _ in _family.ARMS[arm].phases:
    folder = work / "ablation" / f"{arm}_{seed}" / phase
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    points += [
      (before + record["step"], record[METRIC])
      for record in records
      if METRIC in record
    ]
    before += max(record["step"] for record in records)
  return points


def table(
  curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
  base: float | None,
) -> str:
  """Markdown: an arm per row, its mean over the seeds and their range.

  Arms are measured at different steps, since their phases differ: what counts
  is the last measurement up to a column's step.
  """
  last = max(run[-1][0] for runs in curves.values() for run in runs)
  shown = [last * i // 9 for i in range(1, 10)]
  lines = [
    "| arm | " + " | ".join(str(step) for step in shown) + " |",
    "|---|" + "---|" * len(shown),
  ]
  for arm, runs in curves.items():
    cells = [_cell([_at(run, step) for run in runs]) for step in shown]
    lines.append(f"| {_family.ARMS[arm].title} | " + " | ".join(cells) + " |")
  if base is not None:
    lines.append(f"| the base | {100 * base:.1f} |" + " |" * (len(shown) - 1))
  return "\n".join(lines) + "\n"


def _at(run: Sequence[tuple[int, float]], step: int) -> float | None:
  before = [value for measured, value in run if measured <= step]
  return before[-1] if before else None


def _cell(values: Sequence[float | None]) -> str:
  found = [100 * value for value in values if value is not None]
  if not found:
    return ""
  spread = f" ({min(found):.0f}-{max(found):.0f})" if len(found) > 1 else ""
  return f"{np.mean(found):.1f}{spread}"


def plot(
  curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
  base: float | None,
  path: pathlib.Path,
) -> None:
  """Accuracy against steps: the mean of the seeds, and their range."""
  picture = figure.Figure(figsize=(7, 4), layout="tight")
  axes = picture.subplots()
  for arm, runs in curves.items():
    steps = [step for step, _ in runs[0]]
    values = 100 * np.array([[value for _, value in run] for run in runs])
    (line,) = axes.plot(steps, values.mean(0), label=_family.ARMS[arm].title)
    axes.fill_between(
      steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color()
    )
  if base is not None:
    axes.axhline(100 * base, linestyle="--", color="grey", label="the base")
  axes.set_xlabel("steps")
  axes.set_ylabel("scenes with colour, shape and motion right, %")
  axes.legend()
  with files.atomic(path) as temporary:
    picture.savefig(temporary, format="png", dpi=120)


def _base(work: pathlib.Path) -> float | None:
  """The base's own accuracy when its training ended."""
  lines = (work / "base" / "metrics.jsonl").read_text().splitlines()
  found = [
    record[METRIC] for record in map(json.loads, lines) if METRIC in record
  ]
  return found[-1] if found else None
