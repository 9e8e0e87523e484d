"""Metrics and pictures of a run on fixed held-out batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from dcvideogen_jax import errors, tree
from dcvideogen_jax.train import step
from dcvideogen_jax.train import task as task_lib

_ERROR_GAIN = 4
_GAP = 2  # pixels


class Validation:
  """Measures current and EMA parameters on fixed held-out batches.

  The random numbers of the task are the same in every measurement.
  """

  def __init__(
    self, run: step.TrainPlan, batches: Iterable[Mapping[str, np.ndarray]]
  ):
    """Puts `batches` on the devices; each is this process's part of a batch."""
    self._batches = [step.put(run.mesh, batch) for batch in batches]
    self._counts: dict[str, int] = {}
    whole = NamedSharding(run.mesh, P())
    task = run.task

    def sums(variables, batch: task_lib.Batch, number):
      drawn = _draw(task, variables, batch, number)
      return {
        name: (jnp.nansum(value), jnp.sum(~jnp.isnan(value)))
        for name, value in task.predict_fns["measure"](variables, drawn).items()
      }

    def reconstruct(variables, batch: task_lib.VideoBatch):
      drawn = _draw(task, variables, batch, 0)
      return batch["video"], task.predict_fns["reconstruct"](variables, drawn)

    self._sums = jax.jit(sums, out_shardings=whole)
    self._reconstruct = None
    if "reconstruct" in task.predict_fns:
      self._reconstruct = jax.jit(reconstruct, out_shardings=whole)

  def measure(self, state: step.TrainState, frozen: Any) -> dict[str, float]:
    """Returns means over all clips: "val/psnr", and "val/ema_psnr" of the EMA.

    Values that are NaN do not count. A metric that is NaN for all clips is left
    out.

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

  def comparison(
    self, state: step.TrainState, frozen: Any
  ) -> np.ndarray | None:
    """Draws the first clips and their reconstructions, with EMA parameters.

    Returns:
      The picture of `comparison_image`; None if the task reconstructs nothing.
    """
    if self._reconstruct is None:
      return None
    variables = step.ema_variables(state, frozen)
    original, output = self._reconstruct(variables, self._batches[0])
    original = np.asarray(original)[:, : output.shape[1]]
    return comparison_image(original, np.asarray(output))

  def _add_up(self, variables):
    """Yields (name, (sum, count)) over all batches, summed in float64."""
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
  rng = jax.random.fold_in(task_lib.validation_key(), number)
  return task.draw(task.encode(variables, batch), rng)


def comparison_image(
  original: UInt8[np.ndarray, "b t h w 3"],
  output: UInt8[np.ndarray, "b t h w 3"],
  clips: int = 2,
  frames: int = 8,
) -> UInt8[np.ndarray, "H W 3"]:
  """Draws rows of original, reconstruction and error, for evenly spaced frames.

  The error is the absolute difference times 4, clipped to 255.

  Args:
    original: the clips.
    output: their reconstructions.
    clips: number of clips to show, or all if the batch has fewer.
    frames: number of frames to show of each, or all if it has fewer.

  Raises:
    errors.UserError: if the two videos differ in shape.
  """
  if original.shape != output.shape:
    raise errors.UserError(
      f"a video of shape {original.shape} was reconstructed as {output.shape}"
    )
  t = original.shape[1]
  picked = np.linspace(0, t - 1, min(frames, t)).round().astype(int)
  difference = np.abs(original.astype(np.int16) - output)
  error = np.minimum(difference * _ERROR_GAIN, 255).astype(np.uint8)
  rows = []
  for clip in range(min(clips, len(original))):
    for video in (original, output, error):
      padded = np.pad(
        video[clip, picked], ((0, 0), (0, _GAP), (0, _GAP), (0, 0))
      )
      rows.append(np.concatenate(list(padded), axis=1))
  return np.concatenate(rows, axis=0)[:-_GAP, :-_GAP]
