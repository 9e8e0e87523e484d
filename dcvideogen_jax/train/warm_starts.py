"""Initial parameters that let short trainings learn faster than random ones."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, tree

# Factor on the random weights of the main branches, beside the shortcuts.
_BRANCH = 0.1
# The first block of a stage keeps its conv1 unscaled: the shipped weights were
# trained from this start, so it must not change.
_WEAKER = re.compile(r".*/conv2/norm/scale|(?!.*/op_list_0/conv1/).*/kernel")


def through_shortcuts(params: Any, time: str) -> Any:
  """Makes DC-AE-V start as little more than its averaging shortcuts.

  The input and output convolutions pass colours on. One feature channel in four
  becomes a constant, against which the last normalisation measures brightness.
  The other branches are ten times weaker. So the first output already follows
  the mean colour of each block of pixels, which takes hundreds of steps to
  learn from a random start.

  Args:
    params: of `dc_ae_v.DCAEV`, as its `init` gives them.
    time: the model's field, which tells at which tap a kernel sees the current
      frame.

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
  """Adds a matrix to a 3x3x3 kernel at a frame's tap, in the spatial centre."""
  return kernel.at[frame, 1, 1].add(matrix)


# Carried channels: red, green and blue, the three negated, and a constant.
_CARRIED = 7
_CONSTANT = 3.0
_SIGNED = np.concatenate([np.eye(3), -np.eye(3)], axis=1)
# Factors on the random kernels of channels that are not carried, and on the
# kernels of the branches beside the main path.
_REST = 0.1
_SIDE = 0.05
_SIDE_KERNEL = re.compile(r".*/(conv2|proj)/kernel")


def through_colours(params: Any) -> Any:
  """Makes Wan's autoencoder start as a mosaic of mean colours.

  Seven channels carry each block's mean colour from end to end: every colour
  with both signs, since silu(x) - silu(-x) = x, and a constant against which
  the norms measure brightness. From a random start, a model takes a thousand
  steps to learn as much.

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
      # Each half of the output channels becomes one of two frames.
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
  """Returns the taps whose values a main-path kernel carries on, else None."""
  encoding = name.startswith("encoder/")
  if name.endswith("/shortcut/kernel"):
    return [(0, 0, 0)]
  if name.endswith("/resample/kernel"):
    # Downsampling averages each pixel with those below and to the right.
    return [(0, 0), (0, 1), (1, 0), (1, 1)] if encoding else [(1, 1)]
  if encoding and name.endswith("/time_conv/kernel"):
    return [(1, 0, 0), (2, 0, 0)]
  return None


def _carry(
  kernel: jax.Array, matrix: np.ndarray, taps: Sequence[tuple[int, ...]]
) -> jax.Array:
  """Makes the first outputs of a kernel `matrix` times its first inputs.

  The inputs are averaged over the taps. Other inputs do not reach these
  outputs; weights of other outputs are scaled by `_REST`.
  """
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
