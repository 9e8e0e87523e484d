"""Metrics between two lines of progress."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from dcvideogen_jax import errors


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
  """Raises UserError that names the first metric that is not finite."""
  for name, value in metrics.items():
    if not math.isfinite(value):
      raise errors.UserError(
        f"{name} became {value} at step {step}; nothing was saved since the "
        "last checkpoint"
      )


class Window:
  """Means of the metrics since they were last asked for.

  They are read one step late, so that the device is never waited for.
  """

  def __init__(self):
    self._pending = None
    self._seen = []

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    pending, self._pending = self._pending, (step, metrics)
    self._read(pending)

  def flush(self) -> None:
    """Reads the newest step too; raises UserError if anything is not finite."""
    pending, self._pending = self._pending, None
    self._read(pending)

  def means(self) -> dict[str, float]:
    self.flush()
    seen, self._seen = self._seen, []
    return {k: sum(m[k] for m in seen) / len(seen) for k in seen[0]}

  def _read(self, pending: tuple[int, Any] | None) -> None:
    if pending is None:
      return
    step, metrics = pending
    found = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # jit returns dictionaries sorted by key.
    metrics = {"loss": found.pop("loss"), **found}
    require_finite(step, metrics)
    self._seen.append(metrics)
