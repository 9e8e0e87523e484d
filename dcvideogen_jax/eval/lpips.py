"""LPIPS of frames: `models.lpips` over any number of frames and devices.

Follows DC-Gen `apps/metrics/lpips.py` and the evaluation of DC-AE-V (commit
562077c), which call torchmetrics with inputs in [0, 1] and normalize=True:
level n of uint8 becomes n / 127.5 - 1.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, UInt8

from dcvideogen_jax import errors, levels
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.eval import batches, images
from dcvideogen_jax.models import lpips


def distance(
  module: lpips.LPIPS,
  variables: Any,
  reference: UInt8[Array, "n h w 3"],
  other: UInt8[Array, "n h w 3"],
  *,
  batch: int = 8,
) -> Float64[np.ndarray, " n"]:
  """Returns the LPIPS of each frame, 0 if equal.

  The frames are split over the devices that hold the variables.

  Args:
    module: the network.
    variables: its weights; see `networks.load`.
    reference: frames.
    other: frames of the same size.
    batch: frames per device at once. The last batch is padded, so that one
      compiled program serves any number of frames.

  Raises:
    TypeError: if the frames are not uint8.
    ValueError: if the shapes differ.
    errors.UserError: if the frames are too small for the network.
  """
  images.check(reference, other)
  height, width = reference.shape[1:3]
  smallest = lpips.SMALLEST[module.net]
  if min(height, width) < smallest:
    raise errors.UserError(
      f"LPIPS with {module.net} needs frames of at least {smallest} pixels on"
      f" each side, found {height}x{width}"
    )
  compare = functools.partial(_distance, module, variables)
  values = batches.run(
    compare, (reference, other), batches.devices_of(variables), batch
  )
  return values.astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _distance(module, variables, x, y):
  return module.apply(variables, levels.to_float(x), levels.to_float(y))
