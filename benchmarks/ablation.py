"""The ablation: AE-Adapt-V and its alternatives, from the base of `reproduce`.

Defines the arms' stages, and writes their results as JSON, a table and a plot.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import figure, ticker

from dcvideogen_jax import files
from dcvideogen_jax.tiny import chain, family

METRIC = "semantic/all"
_KINDS = {kind: f"semantic/{kind}" for kind in ("colour", "shape", "motion")}

# One measurement: "step", METRIC and the metrics of _KINDS.
Point = Mapping[str, float]


class Arm(NamedTuple):
  """One way to a transformer that works on DC-AE-V's latents.

  Attributes:
    title: name in the table and in the plot.
    phases: training phases in order (names of `adapt.phases.PHASES`), each with
      its flags. "{last}" stands for the folder of the phase before.
  """

  title: str
  phases: Sequence[tuple[str, Sequence[str]]]


_FROM_BASE = "--config.start.base={work}/base/model"
_LORA = ("lora", ("--config.start.weights={last}/model",))
ARMS: Mapping[str, Arm] = {
  "adapt": Arm(
    "AE-Adapt-V",
    (
      ("embed", (_FROM_BASE,)),
      ("head", (_FROM_BASE, "--config.start.patch_embed={last}/model")),
      _LORA,
    ),
  ),
  "skip_embed": Arm(
    "without the first phase", (("head", (_FROM_BASE,)), _LORA)
  ),
  "direct": Arm("fine-tuning without alignment", (("direct", (_FROM_BASE,)),)),
  "scratch": Arm(
    "from nothing", (("scratch", ("--config.start.random=True",)),)
  ),
}


def stages(seeds: Sequence[str]) -> list[chain.Stage]:
  """Returns the stages of every arm for every seed."""
  runs = []
  for seed in seeds:
    for arm, (_, phases) in ARMS.items():
      last = ""
      for phase, arguments in phases:
        name = f"ablation/{arm}_{seed}/{phase}"
        runs.append(
          chain.train(
            name,
            f"{family.T2V},phase={phase}",
            f"--config.seed={seed}",
            *family.LATENTS,
            *(family.DEEP if phase != "embed" else ()),
            *(x.replace("{last}", f"{{work}}/{last}") for x in arguments),
            group=phase,
          )
        )
        last = name
  return runs


def write(work: pathlib.Path, seeds: Sequence[str]) -> str:
  """Writes results.json, table.md and curves.png under ablation/.

  Args:
    work: folder of the chain, in which the trainings of all arms are done.
    seeds: the seeds with which each arm was trained.

  Returns:
    The table as Markdown.
  """
  runs = {arm: [run(work, arm, seed) for seed in seeds] for arm in ARMS}
  base = _measured(work / "base")[-1:]
  output = files.make_directory(work / "ablation")
  shown = table(runs, base)
  results: dict[str, Any] = {"base": base, "runs": runs}
  for name, text in (
    ("results.json", json.dumps(results, indent=1) + "\n"),
    ("table.md", shown),
  ):
    with files.atomic(output / name) as temporary:
      temporary.write_text(text)
  plot(runs, base, output / "curves.png")
  return shown


def run(work: pathlib.Path, arm: str, seed: str) -> Sequence[Point]:
  """Reads the measurements of one run of an arm.

  Args:
    work: folder of the chain.
    arm: a key of `ARMS`.
    seed: the seed of the run.

  Returns:
    The points in order; "step" counts the steps of all phases so far.
  """
  points: list[Point] = []
  before = 0.0
  for phase, _ in ARMS[arm].phases:
    folder = work / "ablation" / f"{arm}_{seed}" / phase
    found = _measured(folder)
    points += [{**point, "step": before + point["step"]} for point in found]
    before += max(record["step"] for record in _records(folder))
  return points


def _records(folder: pathlib.Path) -> list[dict[str, float]]:
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _measured(folder: pathlib.Path) -> Sequence[Point]:
  wanted = ("step", METRIC, *_KINDS.values())
  return [
    {name: record[name] for name in wanted}
    for record in _records(folder)
    if METRIC in record
  ]


def table(
  runs: Mapping[str, Sequence[Sequence[Point]]], base: Sequence[Point]
) -> str:
  """Writes a Markdown table: an arm per row, mean and range over the seeds.

  Arms are measured at different steps, since their phases differ. A column
  shows the last measurement up to its step. The last columns show the shares of
  right colours, shapes and motions at the end.

  Args:
    runs: the points of each seed, by arm.
    base: the last point of the base; empty if it has none.
  """
  last = int(max(x[-1]["step"] for found in runs.values() for x in found))
  ticks = ticker.MaxNLocator(5, integer=True).tick_values(0, last)
  steps = [int(tick) for tick in ticks if 0 < tick < last] + [last]
  lines = [
    f"| arm | {' | '.join([*map(str, steps), *_KINDS])} |",
    "|---|" + "---|" * (len(steps) + len(_KINDS)),
  ]
  for arm, found in runs.items():
    cells = [_cell([_at(points, step) for points in found]) for step in steps]
    cells += _facts([points[-1] for points in found])
    lines.append(f"| {ARMS[arm].title} | " + " | ".join(cells) + " |")
  if base:
    cells = [*[""] * (len(steps) - 1), _cell([base[-1][METRIC]])]
    lines.append("| the base | " + " | ".join([*cells, *_facts(base)]) + " |")
  return "\n".join(lines) + "\n"


def _facts(ends: Sequence[Point]) -> list[str]:
  return [
    f"{100 * np.mean([end[name] for end in ends]):.0f}"
    for name in _KINDS.values()
  ]


def _at(points: Sequence[Point], step: int) -> float | None:
  before = [point[METRIC] for point in points if point["step"] <= step]
  return before[-1] if before else None


def _cell(values: Sequence[float | None]) -> str:
  found = [100 * value for value in values if value is not None]
  if not found:
    return ""
  spread = f" ({min(found):.0f}-{max(found):.0f})" if len(found) > 1 else ""
  return f"{np.mean(found):.1f}{spread}"


def plot(
  runs: Mapping[str, Sequence[Sequence[Point]]],
  base: Sequence[Point],
  path: pathlib.Path,
) -> None:
  """Plots accuracy against steps: the mean over the seeds and their range.

  Args:
    runs: the points of each seed, by arm.
    base: the last point of the base, a dashed line; empty if it has none.
    path: the PNG to write.
  """
  picture = figure.Figure(figsize=(7, 4), layout="constrained")
  axes = picture.subplots()
  for arm, found in runs.items():
    steps = [point["step"] for point in found[0]]
    values = 100 * np.array([[x[METRIC] for x in points] for points in found])
    (line,) = axes.plot(steps, values.mean(0), label=ARMS[arm].title)
    axes.fill_between(
      steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color()
    )
  for point in base:
    axes.axhline(
      100 * point[METRIC], linestyle="--", color="grey", label="the base"
    )
  axes.set_ylim(bottom=0)
  axes.set_xlabel("steps")
  axes.set_ylabel("scenes with all right, %")
  picture.legend(loc="outside lower center", ncols=3)
  with files.atomic(path) as temporary:
    picture.savefig(temporary, format="png", dpi=120)
