"""The parts of a report that every program writes beside its results."""

import json
import platform
import re
from typing import Any

import flax
import jax
import numpy as np

import dcvideogen_jax
from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import memory


def report(clock: clock_lib.Clock, **parts: Any) -> dict[str, Any]:
  """Adds to the parts of a report the entries that every report has.

  Args:
    clock: measured the program's phases.
    **parts: entries of this report.

  Returns:
    The parts, with "seconds" by phase, "memory" (peaks in bytes) and
    "versions".
  """
  return {
    **parts,
    "seconds": clock.report(),
    "memory": {
      "peak_rss_bytes": memory.peak_rss(),
      "peak_device_bytes": memory.peak_device(),
    },
    "versions": versions(),
  }


def versions() -> dict[str, str]:
  """Returns the versions of the libraries, and the kind of the first device."""
  return {
    "dcvideogen_jax": dcvideogen_jax.__version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
  }


def to_json(metrics: dict[str, Any]) -> str:
  """Formats a report as indented JSON, with a list of numbers on one line."""
  text = (
    json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
  )
  return re.sub(
    r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text
  )
