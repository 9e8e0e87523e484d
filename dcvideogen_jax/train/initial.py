"""Starting points other than the random one, for short trainings."""

import re
from typing import Any

import jax
import numpy as np

from dcvideogen_jax import tree

# What is left of the random main branches beside the shortcuts.
_BRANCH = 0.1
# Blocks that come first in their stage keep conv1: the shipped weights were
# trained from this start, so it stays as it was.
_WEAKER = re.compile(r".*/conv2/norm/scale|(?!.*/op_list_0/conv1/).*/kernel")


def through_shortcuts(params: Any, time: str) -> Any:
  """DC-AE-V that starts out as little more than its averaging shortcuts.

  The input and output convolutions pass colours on, one input channel in four
  becomes a constant, which gives the last normalisation something to measure
  brightness against, and the other branches are ten times weaker. So the first
  output already follows the mean colour of each block of pixels, which a random
  start takes hundreds of steps to learn.

  Args:
    params: of `dc_ae_v.DCAEV`, as its `init` gives them.
    time: its temporal design, which says where a kernel sees the present.

  Returns:
    The same tree with other values.
  """
  present = 2 if time == "causal" else 1
  leaves = tree.flatten(params)
  for name, value in leaves.items():
    if _WEAKER.fullmatch(name):
      leaves[name] = value * _BRANCH
  kernel = leaves["encoder/project_in/conv/kernel"]
  features = np.arange(kernel.shape[-1])
  leaves["encoder/project_in/conv/kernel"] = _centre(
    kernel,
    (np.arange(3)[:, None] == features % 4).astype(kernel.dtype),
    present,
  )
  bias = leaves["encoder/project_in/conv/bias"]
  leaves["encoder/project_in/conv/bias"] = bias + (features % 4 == 3)
  for name in (
    "encoder/project_out/kernel",
    "decoder/project_in/kernel",
    "decoder/project_out/conv/kernel",
  ):
    leaves[name] = _centre(
      leaves[name], np.eye(*leaves[name].shape[-2:]), present
    )
  return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def _centre(kernel: jax.Array, matrix: np.ndarray, frame: int) -> jax.Array:
  """Adds a matrix to the centre tap of a frame of a 3x3x3 kernel."""
  return kernel.at[frame, 1, 1].add(matrix)


STARTS = {
  "random": lambda params, time: params,
  "shortcuts": through_shortcuts,
}
