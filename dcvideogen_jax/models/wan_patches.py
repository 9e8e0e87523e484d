"""Patches of `wan_dit`: from latents to tokens and back.

Follows Wan 2.1 `wan/modules/model.py` (commit 9737cba).
"""

from collections.abc import Sequence

import einops
import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array


def to_patches(
  latents: Float[Array, "b t h w c"], patch: Sequence[int]
) -> Float[Array, "b t2 h2 w2 p"]:
  """Flattens each patch of frames, rows and columns, channels last."""
  pt, ph, pw = patch
  return einops.rearrange(
    latents,
    "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)",
    pt=pt,
    ph=ph,
    pw=pw,
  )


def from_patches(
  patches: Float[Array, "b t h w p"], patch: Sequence[int]
) -> Float[Array, "b t2 h2 w2 c"]:
  """The inverse of `to_patches`."""
  pt, ph, pw = patch
  return einops.rearrange(
    patches,
    "b t h w (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
    pt=pt,
    ph=ph,
    pw=pw,
  )


class PatchKernel(nn.Module):
  """The parameters of the patch embedding, a convolution without overlap.

  Attributes:
    shape: frames, rows and columns of a patch, input and output channels.
    param_dtype: dtype of the parameters.
  """

  shape: tuple[int, ...]
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self):
    """Returns the kernel and the bias."""
    init = nn.initializers.xavier_uniform(in_axis=(0, 1, 2, 3))
    kernel = self.param("kernel", init, self.shape, self.param_dtype)
    zeros = nn.initializers.zeros
    return kernel, self.param("bias", zeros, self.shape[-1:], self.param_dtype)
