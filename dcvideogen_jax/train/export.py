"""A run's averaged weights, under their official PyTorch names."""

import json
import os
import pathlib

import jax.numpy as jnp

from dcvideogen_jax import checkpoint, convert, errors
from dcvideogen_jax.models import dc_ae_v
from dcvideogen_jax.train import step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def export(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  dtype: str = "bfloat16",
) -> int:
  """Writes the newest checkpoint as `convert.load` reads it.

  Args:
    workdir: what `loop.fit` was given.
    output: directory for config.json and model.safetensors; made if missing.
    dtype: of the stored weights, a key of `DTYPES`.

  Returns:
    The step of the checkpoint. Its averaged weights were written, or the
    current ones where the run keeps no average.

  Raises:
    errors.UserError: if `workdir` holds no run or no readable checkpoint, or
      `output` cannot be written.
  """
  workdir = pathlib.Path(workdir)
  try:
    config = json.loads((workdir / "config.json").read_text())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{workdir} holds no run: {e}") from e
  # The machine that exports need not be the one that trained.
  run = step.plan(config | {"mesh": {"data": -1}})
  with checkpoint.Checkpointer(workdir / "checkpoints") as saver:
    restored = saver.restore(run.state, repair=False)
  if restored is None:
    raise errors.UserError(f"{workdir} holds no checkpoint yet")
  state = restored.state
  params = state.params if state.ema is None else state.ema
  module = dc_ae_v.build(config["model"])
  convert.save(
    output, "dc_ae_v", module, {"params": params}, dtype=DTYPES[dtype]
  )
  return restored.step
