"""Starting points other than the random one, for short trainings."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, tree

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


# Red, green and blue, the three negated, and a constant.
_CARRIED = 7
_CONSTANT = 3.0
_SIGNED = np.concatenate([np.eye(3), -np.eye(3)], axis=1)
# What is left of random kernels beside the channels that are carried, and of
# the branches beside the main path.
_REST = 0.1
_SIDE = 0.05
_SIDE_KERNEL = re.compile(r".*/(conv2|proj)/kernel")


def through_colours(params: Any) -> Any:
  """Wan's autoencoder that starts out as a mosaic.

  Seven channels carry each block's mean colour from end to end: with both
  signs, since silu(x) - silu(-x) = x, and a constant that gives the norms
  something to measure brightness against. A random start takes a thousand
  steps to learn that much.

  Args:
    params: of `wan_vae.WanVAE`, as its `init` gives them.

  Returns:
    The same tree with other values.

  Raises:
    errors.UserError: if the model has too few channels somewhere.
  """
  leaves = tree.flatten(params)
  for name, kernel in leaves.items():
    if _SIDE_KERNEL.fullmatch(name):
      leaves[name] = kernel * _SIDE
    elif taps := _carrying_taps(name):
      leaves[name] = _carry(kernel, np.eye(_CARRIED), taps)
    elif name.endswith("/upsampler/time_conv/kernel"):
      # Two frames come from the halves of the channels.
      halves = jnp.split(kernel, 2, axis=-1)
      halves = [_carry(x, np.eye(_CARRIED), [(2, 0, 0)]) for x in halves]
      leaves[name] = jnp.concatenate(halves, axis=-1)
    elif name.endswith("quant_conv/kernel"):
      leaves[name] = jnp.eye(kernel.shape[-1])[None, None, None]
  for half in ("encoder", "decoder"):
    present = [(2, 1, 1)]
    name = f"{half}/conv_in"
    signed = np.pad(_SIGNED, ((0, 0), (0, 1)))
    leaves[f"{name}/kernel"] = _carry(leaves[f"{name}/kernel"], signed, present)
    leaves[f"{name}/bias"] = leaves[f"{name}/bias"].at[6].set(_CONSTANT)
    width = leaves[f"{half}/norm_out/scale"].shape[0]
    gain = math.sqrt((_CONSTANT**2 + 1) / width)
    name = f"{half}/conv_out/kernel"
    leaves[name] = _carry(leaves[name], gain * _SIGNED.T, present)
  return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def _carrying_taps(name: str) -> list[tuple[int, ...]] | None:
  """Where a kernel of the main path sees what it carries on."""
  encoding = name.startswith("encoder/")
  if name.endswith("/shortcut/kernel"):
    return [(0, 0, 0)]
  if name.endswith("/resample/kernel"):
    # Halving looks at the block below and to the right.
    return [(0, 0), (0, 1), (1, 0), (1, 1)] if encoding else [(1, 1)]
  if encoding and name.endswith("/time_conv/kernel"):
    return [(1, 0, 0), (2, 0, 0)]
  return None


def _carry(
  kernel: jax.Array, matrix: np.ndarray, taps: Sequence[tuple[int, ...]]
) -> jax.Array:
  """The first inputs go through `matrix`, averaged over taps, and no others."""
  rows, columns = matrix.shape
  if kernel.shape[-2] < rows or kernel.shape[-1] < columns:
    raise errors.UserError(
      f"start 'colours' needs {rows} channels in and {columns} out, found a "
      f"kernel with {kernel.shape[-2]} and {kernel.shape[-1]}"
    )
  kernel = (kernel * _REST).at[..., :columns].set(0)
  for tap in taps:
    at = (*tap, slice(rows), slice(columns))
    kernel = kernel.at[at].set(matrix / len(taps))
  return kernel


DEEP_STARTS = {
  "random": lambda params, time: params,
  "shortcuts": through_shortcuts,
}
WAN_STARTS = {"random": lambda params: params, "colours": through_colours}
