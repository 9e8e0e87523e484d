"""What programs write beside their results."""

import json
import platform
import re
from typing import Any

import flax
import jax
import numpy as np

import dcvideogen_jax


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
