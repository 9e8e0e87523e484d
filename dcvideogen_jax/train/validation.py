"""What a run measures and shows on fixed held-out batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax.train import state as state_lib
from dcvideogen_jax.train import step, strips


class Validation:
  """Measures current and averaged parameters on fixed held-out batches."""

  def __init__(self, run: step.Plan, batches: Iterable[Mapping[str, Any]]):
    """Keeps `batches`, which hold this process's part of each."""
    self._batches = [step.put(run.mesh, batch) for batch in batches]
    whole = NamedSharding(run.mesh, P())
    measure = run.task.predict_fns["measure"]
    self._measure = jax.jit(
      lambda params, batch: jax.tree.map(
        lambda value: value.mean(), measure(params, batch)
      ),
      out_shardings=whole,
    )
    self._reconstruct = jax.jit(
      run.task.predict_fns["reconstruct"], out_shardings=whole
    )
    self._whole = jax.jit(lambda x: x, out_shardings=whole)

  def measure(self, state: state_lib.TrainState) -> dict[str, float]:
    """Means over all clips: "val/psnr", and "val/ema_psnr" of the average."""
    found = {}
    for prefix, params in (("", state.params), ("ema_", state.ema)):
      if params is None:
        continue
      values = [self._measure(params, batch) for batch in self._batches]
      for name in values[0]:
        mean = np.mean([float(value[name]) for value in values])
        found[f"val/{prefix}{name}"] = float(mean)
    return found

  def strip(self, state: state_lib.TrainState) -> np.ndarray:
    """Picture of the first clips as the averaged parameters see them."""
    params = state.params if state.ema is None else state.ema
    batch = self._batches[0]
    output = self._reconstruct(params, batch)
    original = self._whole(batch["video"])
    return strips.strip(np.asarray(original), np.asarray(output))
