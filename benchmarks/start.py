"""Times imports, --help, and the first and second start of a program."""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import tables
from dcvideogen_jax import errors

_CLI = "import sys; from dcvideogen_jax.programs import cli; cli.main()"
# What is started, as the arguments of python.
STARTS: dict[str, tuple[str, ...]] = {
  "python": ("-c", "pass"),
  "import numpy": ("-c", "import numpy"),
  "import jax": ("-c", "import jax.numpy"),
  "import flax": ("-c", "import flax.linen"),
  "import dcvideogen_jax.sample.pipeline": (
    *("-c", "import dcvideogen_jax.sample.pipeline"),
  ),
  "import dcvideogen_jax.train.step": (
    *("-c", "import dcvideogen_jax.train.step"),
  ),
  "dcvideogen --help": ("-c", _CLI, "--help"),
  "dcvideogen sample --help": ("-c", _CLI, "sample", "--help"),
  "dcvideogen train --help": ("-c", _CLI, "train", "--help"),
}
# A program that does all that a user waits for: it reads weights, compiles,
# samples, decodes and writes a video.
_SAMPLE = ("-c", _CLI, "sample", "--model=tiny", "--config.steps=4")
_SAMPLE += ("--prompt=a large yellow circle moves right over desert",)
# Loads a module and prints the CPU time that each package took by itself, with
# what importlib calls for every module that it runs.
_PACKAGES = """
import collections, importlib, json, sys, time
from importlib import _bootstrap
own, inner, load = collections.Counter(), [0.0], _bootstrap._load_unlocked
def timed(spec):
  start = time.process_time()
  inner.append(0.0)
  try:
    return load(spec)
  finally:
    took = time.process_time() - start
    own[spec.name.partition(".")[0]] += took - inner.pop()
    inner[-1] += took
_bootstrap._load_unlocked = timed
importlib.import_module(sys.argv[1])
print(json.dumps(own))
"""


def measure(
  repeats: int,
  starts: Mapping[str, Sequence[str]] = STARTS,
  module: str = "dcvideogen_jax.sample.pipeline",
) -> dict[str, Any]:
  """Starts each program in turns, then samples twice with one new cache.

  CPU seconds, user and system together, hardly depend on what else the machine
  does; wall seconds do.

  Args:
    repeats: starts of each program, of which medians are reported.
    starts: arguments of python by name.
    module: a module whose import is divided among packages.

  Returns:
    "starts": a row for each program, with "cpu s" and "wall s"; "packages":
    a row for each package, with the "cpu ms" that it took by itself while the
    module was imported; "samples": a row for the first and the second start of
    `dcvideogen sample`, with "cpu s", "wall s" and the wall seconds of each of
    the program's phases.

  Raises:
    errors.UserError: if a program fails.
  """
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
  for _ in range(repeats):
    for name, arguments in starts.items():
      found[name].append(_run(name, arguments)[:2])
  _, _, text = _run(module, ("-c", _PACKAGES, module))
  packages = sorted(json.loads(text).items(), key=lambda x: -x[1])
  return {
    "starts": [
      {
        "start": name,
        **_seconds([*map(statistics.median, zip(*pairs, strict=True))]),
      }
      for name, pairs in found.items()
    ],
    "packages": [
      {"package": name, "cpu ms": round(1000 * s)} for name, s in packages[:16]
    ],
    "samples": samples(),
  }


def samples(arguments: Sequence[str] = _SAMPLE) -> list[dict[str, Any]]:
  """Runs a sampling program twice, the first time without compiled programs.

  Returns:
    The rows "samples" of `measure`.

  Raises:
    errors.UserError: if the program fails.
  """
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for name in ("first", "second"):
      output = pathlib.Path(folder) / name
      cache = f"--compile_cache={folder}/cache"
      found = _run("sample", (*arguments, f"--output={output}", cache))
      (report,) = output.rglob("*.json")
      phases = json.loads(report.read_text())["seconds"]
      row = {"start": f"sample, {name}", **_seconds(found[:2])}
      rows.append(row | {f"{k} s": s for k, s in phases.items()})
  return rows


def _seconds(pair: Sequence[float]) -> dict[str, float]:
  return dict(zip(("cpu s", "wall s"), pair, strict=True))


def _run(name: str, arguments: Sequence[str]) -> tuple[float, float, str]:
  """Runs python; returns CPU and wall seconds, and what it printed."""
  root = str(pathlib.Path(__file__).parents[1])
  path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.perf_counter()
  done = subprocess.run(
    [sys.executable, *arguments],
    env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    capture_output=True,
    text=True,
  )
  wall = time.perf_counter() - start
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  if done.returncode:
    reason = (
      done.stderr.strip() or f"exit code {done.returncode}"
    ).splitlines()
    raise errors.UserError(f"{name} failed: {reason[-1]}")
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return cpu, wall, done.stdout


def table(report: Mapping[str, Any]) -> str:
  """Formats the report as three tables."""
  return "\n\n".join(tables.markdown(rows) for rows in report.values())
