"""Times a task in this code and in PyTorch, each side alone in its process.

A task is a module of `benchmarks.tasks`: `jax(request)` and `torch(request)`
build a `Side`, and `NEEDS` names the packages of each. `benchmarks.worker` runs
one of them.
"""

import importlib
import importlib.metadata
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import processes, tables
from dcvideogen_jax import errors

SIDES = ("jax", "torch")


class Side(NamedTuple):
  """A task in one framework, ready to run.

  Attributes:
    calls: functions by name, called in this order again and again. Each returns
      an array, channels last, which both sides compute up to rounding.
    compile_s: seconds that compilation took.
    flops: called after all is measured; returns the FLOPs of a call by name,
      for those that are counted. Convolutions count in their direct form,
      whatever computes them.
  """

  calls: Mapping[str, Callable[[], np.ndarray]]
  compile_s: float = 0.0
  flops: Callable[[], Mapping[str, int]] = dict


def compare(
  task: str,
  request: Mapping[str, Any],
  *,
  sides: Sequence[str] = SIDES,
  threads: int = 2,
  repeats: int = 1,
  rounds: int = 1,
  warm_up: bool = True,
) -> dict[str, Any]:
  """Runs a task on each side, in turns: a b, b a, a b, ...

  Args:
    task: the name of a module of `benchmarks.tasks`.
    request: what the task's functions take, as JSON.
    sides: names of `SIDES`, run in this order.
    threads: number of cores that a process may use.
    repeats: timed runs in each process.
    rounds: processes of each side.
    warm_up: whether each process runs once before it is timed.

  Returns:
    A JSON object with the settings, "versions", and "sides", by name, with a
    number for each process: "load_s", "compile_s", "product_rate" of
    `products.rate`, and bytes of resident memory "loaded_bytes" before the
    first run and "peak_bytes" at the end; and "calls", by name, with a number
    for each run: seconds "s" and CPU seconds of all cores "core_s". "flops" has
    those of a call, by name, if a side that ran counts them. With two sides
    also "differences" by call: the largest absolute difference "max_abs", and
    the "largest" absolute value.

  Raises:
    errors.UserError: if a package that a side needs is not installed, or the
      process of a side fails.
  """
  needs = importlib.import_module(f"benchmarks.tasks.{task}").NEEDS
  versions = {name: _version(name) for side in sides for name in needs[side]}
  request = {**request, "threads": threads, "repeats": repeats}
  request |= {"task": task, "warm_up": warm_up}
  measured: dict[str, list[Any]] = {side: [] for side in sides}
  outputs: dict[str, dict[str, np.ndarray]] = {}
  with tempfile.TemporaryDirectory() as folder:
    for number in range(rounds):
      for side in sides if number % 2 == 0 else sides[::-1]:
        path = pathlib.Path(folder) / f"{side}.npz"
        measured[side].append(
          processes.run(
            "benchmarks.worker",
            {**request, "side": side, "outputs": str(path)},
          )
        )
        with np.load(path) as file:
          outputs[side] = {**file}
  report = {
    "task": task,
    "threads": threads,
    "machine": platform.machine(),
    "versions": versions,
    "flops": dict(
      item for found in measured.values() for item in found[0]["flops"].items()
    ),
    "sides": {side: _joined(found) for side, found in measured.items()},
  }
  if len(outputs) == 2:
    report["differences"] = _differences(*outputs.values())
  return report


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError as e:
    raise errors.UserError(
      f"this comparison needs the package {package}, which is not installed"
    ) from e


def _joined(processes_: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Joins the measurements of the processes of a side."""
  first = processes_[0]
  names = [name for name in first if name not in ("calls", "flops")]
  return {name: [x[name] for x in processes_] for name in names} | {
    "calls": {
      call: {
        key: [value for x in processes_ for value in x["calls"][call][key]]
        for key in figures
      }
      for call, figures in first["calls"].items()
    }
  }


def _differences(
  a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  return {
    name: {
      "max_abs": float(np.abs(a[name] - b[name]).max()),
      "largest": float(np.abs(b[name]).max()),
    }
    for name in a
  }


Rows = Sequence[tuple[str, Callable[[Any], float]]]


def table(report: Mapping[str, Any], more: Rows = ()) -> str:
  """Formats medians, with the ratio of the first side to the second.

  The share of the peak is that of the fastest matrix products of any side. It
  counts convolutions in their direct form, so that a form with fewer
  multiplications can have more than all of it.

  Args:
    report: of `compare`.
    more: further rows, as a label and a function of a side's measurements.
  """
  sides = report["sides"]
  calls = [*next(iter(sides.values()))["calls"]] if sides else []
  rows: list[tuple[str, Callable[[Any], float]]] = [
    ("compile, s", lambda side: statistics.median(side["compile_s"]))
  ]
  for call in calls:
    for label, key in (("s", "s"), ("core s", "core_s")):
      rows.append(
        (
          f"{call}, {label}",
          lambda side, call=call, key=key: statistics.median(
            side["calls"][call][key]
          ),
        )
      )
  if report["flops"]:
    rows.append(
      ("matrix products, GFLOP/s", lambda side: max(side["product_rate"]) / 1e9)
    )
  peak = max((max(side["product_rate"]) for side in sides.values()), default=0)
  for call, work in report["flops"].items():
    rows.append(
      (
        f"{call}, share of the peak",
        lambda side, call=call, work=work: (
          work / statistics.median(side["calls"][call]["s"]) / peak
        ),
      )
    )
  for label, key in (("loaded", "loaded_bytes"), ("peak", "peak_bytes")):
    rows.append(
      (
        f"memory {label}, GiB",
        lambda side, key=key: statistics.median(side[key]) / 2**30,
      )
    )
  lines = [tables.markdown([_row(sides, *row) for row in (*rows, *more)])]
  for name, found in report.get("differences", {}).items():
    lines.append(
      f"{name}: outputs differ by up to {found['max_abs']:.2e}"
      f" of values up to {found['largest']:.3g}"
    )
  return "\n".join(lines)


def _row(
  sides: Mapping[str, Any], label: str, value: Callable[[Any], float]
) -> dict[str, Any]:
  values = {name: value(side) for name, side in sides.items()}
  row: dict[str, Any] = {"": label}
  row |= {name: f"{x:.2f}" for name, x in values.items()}
  if len(values) == 2:
    a, b = values.values()
    row["ratio"] = f"{a / b:.2f}" if b else ""
  return row
