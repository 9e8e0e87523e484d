"""Runs a side of a benchmark in its own process; measures its memory."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dcvideogen_jax import errors


def run(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
  """Runs `python -m module` on the CPU, with the request as JSON on stdin.

  Returns:
    The JSON object on the last line of the process's stdout.

  Raises:
    errors.UserError: if the process fails; the message names `request["side"]`.
  """
  root = str(pathlib.Path(__file__).parents[1])
  path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
  environment = {
    **os.environ,
    "PYTHONPATH": path.rstrip(os.pathsep),
    "JAX_PLATFORMS": "cpu",
    # With a program from the cache, the compile time would be missing.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  done = subprocess.run(
    [sys.executable, "-m", module],
    input=json.dumps(request),
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode:
    reason = (
      done.stderr.strip() or f"exit code {done.returncode}"
    ).splitlines()
    raise errors.UserError(f"the {request['side']} side failed: {reason[-1]}")
  return json.loads(done.stdout.splitlines()[-1])


def pin(threads: int) -> None:
  """Limits this process to `threads` cores, which XLA's thread pool respects.

  Does nothing where the operating system has no CPU affinity.
  """
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def resident_bytes() -> int:
  """Returns the resident memory of this process now; needs Linux's /proc."""
  return _status("VmRSS")


def peak_bytes() -> int:
  """Returns the peak resident memory of this process; needs Linux's /proc.

  `ru_maxrss` begins with the peak of the process that started this one.
  """
  return _status("VmHWM")


def _status(name: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return int(text.split(f"{name}:")[1].split()[0]) * 1024
