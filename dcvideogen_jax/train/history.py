"""Which samples each step saw."""

import hashlib
import os
from collections.abc import Mapping

import jax
import numpy as np

from dcvideogen_jax import files, report


class History:
  """Appends to history.jsonl what this process read for each step.

  A line is {"step": n, "samples": [digest of each sample]}. Process i > 0
  writes history.<i>.jsonl. Reopening a run at an earlier step drops what was
  read after that step, so what stays led to the parameters.
  """

  def __init__(self, directory: str | os.PathLike[str], first_step: int):
    """Opens the file to continue after `first_step`."""
    index = jax.process_index()
    name = f"history.{index}.jsonl" if index else "history.jsonl"
    self._records = report.Records(files.path(directory) / name, first_step)

  def add(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
    """Records the batch of a step; each array has a leading batch axis."""
    columns = [np.asarray(batch[name]) for name in sorted(batch)]
    samples = [digest(row) for row in zip(*columns, strict=True)]
    self._records.add({"step": step, "samples": samples})

  def flush(self) -> None:
    """Writes what waits; due before a checkpoint."""
    self._records.flush()


def digest(arrays: tuple[np.ndarray, ...]) -> str:
  """16 hexadecimal digits that stand for the content of one sample."""
  found = hashlib.blake2b(digest_size=8)
  for array in arrays:
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()
