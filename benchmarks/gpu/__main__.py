"""Times kernels and models on the GPU that jax finds, in at most eight minutes.

  python -m benchmarks.gpu --output=out/gpu

needs jax with CUDA, flax, numpy, optax, einops, jaxtyping and absl. Each part
runs in a process of its own, the most important first, and has a time limit.
Rows are appended to results.jsonl as they are measured; results.md has them as
tables. A row or a part that fails has its error there, the others go on, and
the exit code is 1. Programs that were compiled stay in OUTPUT/xla.

Without a GPU the program says what it would do, runs every part at toy size on
the CPU, and exits with 0 if all of them run. With --compile_for=h200 it
compiles every program for a GPU that is not there (requirements-cuda.txt), and
runs nothing.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks import tables
from benchmarks.gpu import parts

_OUTPUT = flags.DEFINE_string("output", "out/gpu", "Folder of the results.")
_MINUTES = flags.DEFINE_float("minutes", 8, "The most that all parts may take.")
_ONLY = flags.DEFINE_list("only", [], "Parts to run; unset: all of them.")
_COMPILE_FOR = flags.DEFINE_string(
  "compile_for", None, "A GPU to compile for without running, such as h200."
)
# Shares the GPU's memory as the programs of this project do.
_SETTINGS = {
  "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Seconds for a part where no GPU is waiting.
_PATIENCE = 1800.0
_FIND = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"


def main(argv: Sequence[str]) -> None:
  """Runs the parts and writes their rows; exits with 1 if one failed."""
  del argv
  names = _ONLY.value or [*parts.PARTS]
  if unknown := sorted({*names} - {*parts.PARTS}):
    print(f"--only: expected some of {', '.join(parts.PARTS)}, found {unknown}")
    sys.exit(2)
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  rows_file = output / "results.jsonl"
  rows_file.write_text("", encoding="utf-8")
  environment = surroundings(output)
  end = time.monotonic() + 60 * _MINUTES.value
  options = choose(environment, names)
  if options:
    environment["JAX_PLATFORMS"] = "cpu"
  for name in names:
    started = time.monotonic()
    # Only a GPU is worth the hurry.
    limit = min(parts.PARTS[name].seconds, end - started)
    run(name, options, rows_file, _PATIENCE if options else limit, environment)
    write(rows_file, output / "results.md")
    print(summary(name, rows_file, time.monotonic() - started), flush=True)
  print(f"wrote {rows_file} and results.md")
  sys.exit(any("failed" in row for row in read(rows_file)))


def choose(environment: Mapping[str, str], names: Sequence[str]) -> list[str]:
  """Says where the parts run; returns the flags for all but a real GPU."""
  if _COMPILE_FOR.value:
    print(f"compiles for {_COMPILE_FOR.value}; nothing runs")
    return [f"--target={_COMPILE_FOR.value}"]
  platform, _, kind = find(environment).partition(" ")
  print(f"jax finds {kind or 'no device'}")
  if platform == "gpu":
    return []
  print(absent(names))
  return ["--toy"]


def summary(name: str, rows_file: pathlib.Path, seconds: float) -> str:
  """Returns a line for a part, and one for each of its rows that failed."""
  found = [row for row in read(rows_file) if row["part"] == name]
  bad = [row for row in found if "failed" in row]
  lines = [f"{name}: {len(found)} rows, {len(bad)} failed, {seconds:.0f} s"]
  return "\n".join(
    [*lines, *(f"  {row['case']}: {row['failed']}" for row in bad)]
  )


def surroundings(output: pathlib.Path) -> dict[str, str]:
  """Returns the environment of the parts; what the user has set stays."""
  root = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
  cache = {"JAX_COMPILATION_CACHE_DIR": str((output / "xla").resolve())}
  return {
    **_SETTINGS,
    **cache,
    **os.environ,
    "PYTHONPATH": path.rstrip(os.pathsep),
  }


def find(environment: Mapping[str, str]) -> str:
  """Returns the platform and the kind of jax's first device; "" if it fails."""
  done = subprocess.run(
    [sys.executable, "-c", _FIND],
    env=environment,
    capture_output=True,
    text=True,
  )
  return (done.stdout.strip().splitlines() or [""])[-1]


def absent(names: Sequence[str]) -> str:
  """Says what would run on a GPU."""
  lines = ["With a GPU these parts would run, each for at most these seconds:"]
  for name in names:
    part = parts.PARTS[name]
    lines.append(f"  {name:<18}{part.seconds:>4.0f}  {part.title}")
  return "\n".join([*lines, "Here they run on the CPU, at toy size."])


def run(
  name: str,
  options: Sequence[str],
  rows_file: pathlib.Path,
  seconds: float,
  environment: Mapping[str, str],
) -> None:
  """Runs a part in a process; what ends it early becomes a row.

  Args:
    name: a key of `parts.PARTS`.
    options: further flags of `benchmarks.gpu.parts`.
    rows_file: gets the rows.
    seconds: after which the process is killed.
    environment: of the process.
  """
  command = [sys.executable, "-m", "benchmarks.gpu.parts", f"--part={name}"]
  command += [f"--rows={rows_file}", f"--seconds={seconds}", *options]
  failed = "no time was left"
  if seconds > 0:
    try:
      done = subprocess.run(
        command,
        env={**environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=seconds,
      )
      if not done.returncode:
        return
      said = done.stderr.strip().splitlines() or [""]
      failed = f"exit code {done.returncode}: {said[-1]}"
    except subprocess.TimeoutExpired:
      failed = f"ended after {seconds:.0f} s"
  row = {"part": name, "case": "the rest", "failed": failed}
  with rows_file.open("a", encoding="utf-8") as file:
    print(json.dumps(row), file=file)


def read(rows_file: pathlib.Path) -> list[dict[str, Any]]:
  """Returns all rows so far; a line that was cut off by a kill is left out."""
  rows = []
  for line in rows_file.read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows


def write(rows_file: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the rows as a table for each part."""
  rows = read(rows_file)
  text = []
  for name, part in parts.PARTS.items():
    own = [
      {k: v for k, v in row.items() if k != "part"}
      for row in rows
      if row["part"] == name
    ]
    if own:
      text += [f"## {part.title}", "", tables.markdown(own), ""]
  path.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
