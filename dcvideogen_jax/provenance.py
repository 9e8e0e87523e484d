"""What programs write beside their results."""

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
  """The parts of a report, and what every report has.

  Returns:
    the parts; "seconds" by phase; "memory", peaks in bytes; "versions".
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
  return {
    "dcvideogen_jax": dcvideogen_jax.__version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
  }


def to_json(metrics: dict[str, Any]) -> str:
  """JSON for people, with the values of many frames on one line."""
  text = (
    json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
  )
  return re.sub(
    r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text
  )
