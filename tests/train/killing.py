"""Trainings that are killed at random and started again, and their traces."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import checkpoint, tree
from dcvideogen_jax.train import step
from tests import compiling

ROOT = pathlib.Path(__file__).parents[2]


def start(
  command: Sequence[str],
  cache: pathlib.Path,
  flags: str = "",
  largest_file: str = "unlimited",
) -> subprocess.Popen[str]:
  """`python -m COMMAND` in the checkout.

  Args:
    command: a module, such as "launch.train", and its arguments.
    cache: directory for compiled programs, so that only the first start of
      several compiles.
    flags: for XLA, beside those that keep compiling short.
    largest_file: KiB that a file may have, which acts like a full disk.
  """
  return subprocess.Popen(
    [
      *("bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash"),
      *(sys.executable, "-m", *command),
    ],
    cwd=ROOT,
    env=os.environ
    | {
      "XLA_FLAGS": f"{compiling.FLAGS} {flags}",
      "PYTHONUNBUFFERED": "1",
      "XDG_CACHE_HOME": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """Waits; (exit code, rest of stdout, stderr)."""
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def read_to(process: subprocess.Popen[str], at: int) -> int:
  """Reads until the process tells of step `at` or a later one.

  0 stands for the moment before the first step is compiled. Needs
  `config.log_every` 1.

  Returns:
    The step that it told of last; -1 if it ended without a word.
  """
  last = -1
  for line in process.stdout or ():
    if found := re.match(r"step (\d+)/", line):
      last = int(found[1])
    elif line.startswith("compiling"):
      last = max(last, 0)
    if last >= at:
      break
  return last


# More steps than a tiny run takes in `_DELAY` seconds: 15 ms each, saved.
_ROOM, _DELAY = 14, 0.15


def run_with_kills(
  command: Sequence[str],
  kills: int,
  rng: np.random.Generator,
  *,
  steps: int,
  cache: pathlib.Path,
  room: int = _ROOM,
) -> list[int]:
  """Runs a training to its end, with SIGKILL on the way.

  Args:
    command: as for `start`, with `--config.log_every=1`.
    kills: how often to kill it: at random steps, each time up to `_DELAY`
      after the line that tells of it, so also while it saves. A step 0 is the
      time before the first one. Only the last kill is one of the last steps,
      as a run that goes on for the delay must not end before it.
    rng: chooses.
    steps: of the training, more than `room`.
    cache: as for `start`.
    room: more steps than the training takes in `_DELAY` seconds.

  Returns:
    The steps told of last before each kill.

  Raises:
    AssertionError: if the training ends early or fails.
  """
  killed = []
  early = rng.choice(steps - room, size=kills - 1, replace=False)
  for at in (*sorted(early), rng.integers(steps - room, steps)):
    process = start(command, cache)
    last = read_to(process, int(at))
    assert last >= at, finish(process)
    time.sleep(_DELAY * rng.random())
    process.send_signal(signal.SIGKILL)
    code, out, err = finish(process)
    assert code == -signal.SIGKILL, (code, out, err)
    killed.append(last)
  code, out, err = finish(start(command, cache))
  assert code == 0, (out, err)
  return killed


def state(config: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Name -> array of the newest checkpoint, which must be of the last step."""
  run = step.plan({**config, "mesh": {"data": -1}})
  directory = workdir / "checkpoints"
  with checkpoint.Checkpointer(directory, read_only=True) as saver:
    found = saver.restore(run.state)
  assert found is not None and found.step == config["steps"]
  return {k: np.asarray(v) for k, v in tree.flatten(found.state).items()}


def assert_same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
  """Compares what `state` gives."""
  assert one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(other[name], value, err_msg=name)


def history(
  workdir: pathlib.Path, steps: int, process: int = 0
) -> list[list[str]]:
  """The digests of the samples that led to the last state, step by step."""
  name = f"history.{process}.jsonl" if process else "history.jsonl"
  lines = (workdir / name).read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [line["step"] for line in found] == list(range(1, steps + 1))
  return [line["samples"] for line in found]
