"""Tries cases in a process that can be given up, and judges what came of them.

  python -m tests.damage.trial FIRST LAST [FILE]

tries cases by number, prints those that went wrong and a table, and writes all
as JSON lines.
"""

import collections
import importlib
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from tests.damage import reading

ROOT = pathlib.Path(__file__).parents[2]
# Seconds that reading may take, those after which the process is given up (it
# may have to make the input first), and those that it may take to start.
_LONGEST, _PATIENCE, _START = 10, 60, 200
_LONGEST_MESSAGE = 4000
_BLIND = {"nothing": (), "values": ("values",), "all": ("values", "names")}

Found = dict[str, Any]


def judged(found: Found, given: reading.Input) -> str:
  """What is wrong with an outcome of `worker.attempt`; "" if it is right."""
  outcome = found["outcome"]
  if found["left"]:
    return f"it left or changed {found['left']}"
  if outcome == "sentence":
    if not found["named"]:
      return "the sentence names no file"
    return "" if len(found["message"]) < _LONGEST_MESSAGE else "it is long"
  if outcome == "equal":
    return ""
  if outcome in ("values", "names") and found["said"]:
    return ""
  if outcome in ("values", "names") and found["field"]:
    free = any(re.search(x, found["damage"]) for x in given.free)
  else:
    free = outcome in _BLIND[given.blind]
  return "" if free else outcome


class Trials:
  """A process that tries cases; a context manager."""

  def __init__(
    self,
    directory: pathlib.Path,
    module: str = "tests.damage.inputs",
    longest: int = _LONGEST,
    patience: int = _PATIENCE,
  ):
    """Says which cases.

    Args:
      directory: for what is read, and the process's stderr.
      module: that has the `INPUTS`.
      longest: seconds that reading may take.
      patience: seconds after which the process is given up.
    """
    self._directory, self._module = directory, module
    self._longest, self._patience = longest, patience
    self._inputs = importlib.import_module(module).INPUTS
    self._stderr = directory / "stderr"
    self._process: subprocess.Popen | None = None

  def __enter__(self) -> "Trials":
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def run(self, numbers: Iterable[int]) -> Iterator[Found]:
    """What came of each case, as of `worker.attempt`, and "wrong"."""
    for number in numbers:
      found = self._one(number)
      given = self._inputs[number % len(self._inputs)]
      yield {**found, "wrong": judged(found, given)}

  def _one(self, number: int) -> Found:
    if self._process is None:
      self._process = self._started()
    process = self._process
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    line = _line(process, self._patience)
    if line:
      return json.loads(line)
    self._stop()
    return {
      "number": number,
      "input": self._inputs[number % len(self._inputs)].name,
      "outcome": "slow" if line is None else "crash",
      "message": self._stderr.read_text()[-2000:],
      **{"damage": "", "field": False, "named": False},
      **{"said": [], "left": [], "seconds": self._patience},
    }

  def _started(self) -> subprocess.Popen:
    directory = tempfile.mkdtemp(dir=self._directory)
    with self._stderr.open("w") as stderr:
      process = subprocess.Popen(
        [sys.executable, "-m", "tests.damage.worker"]
        + [directory, self._module, str(self._longest)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
      )
    assert _line(process, _START), "the process did not start"
    return process

  def _stop(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
    self._process = None


def _line(process: subprocess.Popen, seconds: float) -> str | None:
  """The next line of a process; "" if it ended, None if it takes longer."""
  ready, _, _ = select.select([process.stdout], [], [], seconds)
  return process.stdout.readline() if ready else None


def table(found: Iterable[Found]) -> str:
  """How often each outcome came, by input."""
  rows = collections.defaultdict(collections.Counter)
  columns = {}
  for x in found:
    columns[x["outcome"]] = None
    for name in (x["input"], "all"):
      rows[name][x["outcome"]] += 1
      rows[name]["wrong"] += bool(x["wrong"])
  columns["wrong"] = None
  rows["all"] = rows.pop("all")
  width = max(map(len, rows))
  lines = [" " * width + "".join(f"{c:>11}" for c in columns)]
  for name, row in rows.items():
    counts = "".join(f"{row[c] or '':>11}" for c in columns)
    lines.append(f"{name:{width}}{counts}")
  return "\n".join(lines)


def told(found: Found) -> str:
  """A case for people."""
  message = " ".join(found["message"][-900:].split())
  return (
    f"case {found['number']}, {found['input']}: {found['damage']}:"
    f" {found['wrong'] or found['outcome']}: {message}"
  )


def main(first: int, last: int, file: str = "") -> None:
  tried = []
  with tempfile.TemporaryDirectory() as directory:
    with Trials(pathlib.Path(directory)) as trials:
      for found in trials.run(range(first, last)):
        tried.append(found)
        if found["wrong"] or last == first + 1:
          print(told(found), flush=True)
  if file:
    lines = [json.dumps(found) for found in tried]
    pathlib.Path(file).write_text("\n".join(lines) + "\n")
  print(table(tried))


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
