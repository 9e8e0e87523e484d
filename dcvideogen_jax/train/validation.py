"""What a run measures and shows on fixed held-out batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, tree
from dcvideogen_jax.train import state as state_lib
from dcvideogen_jax.train import step, strips
from dcvideogen_jax.train import task as task_lib


class Validation:
  """Measures current and averaged parameters on fixed held-out batches.

  What a task draws is the same every time.
  """

  def __init__(self, run: step.Plan, batches: Iterable[Mapping[str, Any]]):
    """Keeps `batches`, which hold this process's part of each."""
    self._batches = [step.put(run.mesh, batch) for batch in batches]
    self._counts: dict[str, int] = {}
    whole = NamedSharding(run.mesh, P())
    task = run.task

    def sums(variables, batch, number):
      drawn = _draw(task, variables, batch, number)
      return {
        name: (jnp.nansum(value), jnp.sum(~jnp.isnan(value)))
        for name, value in task.predict_fns["measure"](variables, drawn).items()
      }

    def reconstruct(variables, batch):
      drawn = _draw(task, variables, batch, 0)
      return batch["video"], task.predict_fns["reconstruct"](variables, drawn)

    self._sums = jax.jit(sums, out_shardings=whole)
    self._reconstruct = None
    if "reconstruct" in task.predict_fns:
      self._reconstruct = jax.jit(reconstruct, out_shardings=whole)

  def measure(
    self, state: state_lib.TrainState, frozen: Any
  ) -> dict[str, float]:
    """Means over all clips: "val/psnr", and "val/ema_psnr" of the average.

    They are means over what is not NaN. A metric for which nothing counts is
    left out.

    Raises:
      errors.UserError: if a metric is NaN for other samples than in the first
        measurement.
    """
    found = {}
    for prefix, params in (("", state.params), ("ema_", state.ema)):
      if params is None:
        continue
      for name, (total, count) in self._add_up(tree.merge(params, frozen)):
        label = f"val/{prefix}{name}"
        if count != self._counts.setdefault(name, count):
          raise errors.UserError(
            f"{label} became nan at step {int(state.step)}: {count} samples "
            f"have a value, {self._counts[name]} had one before"
          )
        if count:
          found[label] = total / count
    return found

  def strip(
    self, state: state_lib.TrainState, frozen: Any
  ) -> np.ndarray | None:
    """Picture of the first clips as the averaged parameters see them.

    None for a task that reconstructs nothing.
    """
    if self._reconstruct is None:
      return None
    variables = state_lib.averaged(state, frozen)
    original, output = self._reconstruct(variables, self._batches[0])
    original = np.asarray(original)[:, : output.shape[1]]
    return strips.strip(original, np.asarray(output))

  def _add_up(self, variables):
    """(name, (sum, count)) over all batches, in float64."""
    each = [
      jax.device_get(self._sums(variables, batch, number))
      for number, batch in enumerate(self._batches)
    ]
    for name in each[0]:
      totals, counts = zip(*(values[name] for values in each), strict=True)
      yield name, (float(np.sum(totals, dtype=np.float64)), int(sum(counts)))


def _draw(
  task: task_lib.Task, variables: Any, batch: task_lib.Batch, number: Any
) -> task_lib.Batch:
  rng = jax.random.fold_in(state_lib.validation_key(), number)
  return task.draw(task.encode(variables, batch), rng)
