"""The transformer for new latents from one that is trained already.

Follows DC-Gen `applications/dc_videogen/wan_{t2v,i2v}_assemble.py` (commit
562077c): all but the patch embedding and the output projection is copied. An
image-to-video model from a text-to-video one is an addition.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp

from dcvideogen_jax import differences, errors
from dcvideogen_jax.models import wan_dit

Shapes = Mapping[str, tuple[int, ...]]

# What belongs to latents of one kind.
_SPACE = re.compile(r"patch_embed/.*|head/.*")
# What only image-to-video models have.
_IMAGE = re.compile(
  r"image_embed/.*|blocks/cross_attn/(k_img|v_img|norm_k_img)/.*"
)
# Where zeros leave the output as it is: the values of attention to the image.
_ZERO_INITIALISED = re.compile(r"blocks/cross_attn/v_img/.*")
_KERNEL = "patch_embed/kernel"


def for_latent_space(name: str) -> bool:
  """Whether a parameter belongs to latents of one kind."""
  return bool(_SPACE.fullmatch(name))


def require_compatible(
  target: wan_dit.WanDiT, source: wan_dit.WanDiT, same_space: bool
) -> None:
  """Compares what the shapes of parameters do not tell.

  Args:
    target: the model that is assembled.
    source: the model that is copied.
    same_space: whether both are for latents of the same kind.

  Raises:
    errors.UserError: if they differ in heads or eps or, with the same latents,
      in the patch or the positions.
  """
  fields = ["heads", "eps", *(["patch", "rope_scale"] if same_space else [])]
  wrong = [
    f"{name} {getattr(target, name)}, found {getattr(source, name)}"
    for name in fields
    if getattr(target, name) != getattr(source, name)
  ]
  if wrong:
    raise errors.UserError(
      "the weights to start from are another model's: expected "
      + "; ".join(wrong)
    )


def new_parameters(
  target: Shapes, source: Shapes, same_space: bool
) -> list[str]:
  """Names of the parameters that are not copied.

  Args:
    target: name -> shape of the parameters that are assembled.
    source: name -> shape of those that there are.
    same_space: whether both are for latents of the same kind, so that patch
      embedding and output projection are copied too.

  Raises:
    errors.UserError: lists what cannot be copied but ought to be.
  """
  new = [
    name
    for name in target
    if (not same_space and for_latent_space(name))
    or (name not in source and _IMAGE.fullmatch(name))
  ]
  expected = {name: target[name] for name in target if name not in new}
  found = {
    name: shape
    for name, shape in source.items()
    if same_space or not for_latent_space(name)
  }
  if same_space and _widened(target[_KERNEL], found.get(_KERNEL, ())):
    expected[_KERNEL] = found[_KERNEL]
  differences.require_equal(expected, found, "the transformer to start from")
  return new


def _widened(target: tuple[int, ...], source: tuple[int, ...]) -> bool:
  """Whether a patch kernel has the mask and the condition more."""
  if len(source) != len(target) or source == target:
    return False
  *patch, channels, width = source
  return tuple(target) == (*patch, 2 * channels + 4, width)


def assemble(
  target: Shapes,
  source: Mapping[str, Any],
  new: Mapping[str, Any],
  patch_embed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The parameters of the target.

  The patch embedding gets zeros for channels that it did not have, and the
  values of attention to the image are zero if they are new: so an
  image-to-video model begins as the text-to-video model that it comes from.

  Args:
    target: name -> shape.
    source: parameters to copy, name -> array; others are left out.
    new: name -> array of what `new_parameters` names.
    patch_embed: "kernel" and "bias" from the first phase, instead of new ones.

  Returns:
    The nested tree; what is copied is the same array.

  Raises:
    errors.UserError: if a shape is not the target's.
  """
  leaves = {name: new.get(name, source.get(name)) for name in target}
  for name in new:
    if _ZERO_INITIALISED.fullmatch(name):
      leaves[name] = jnp.zeros_like(new[name])
  kernel = leaves[_KERNEL]
  if _KERNEL not in new and kernel.shape != target[_KERNEL]:
    more = target[_KERNEL][-2] - kernel.shape[-2]
    widths = [(0, more if axis == 3 else 0) for axis in range(5)]
    leaves[_KERNEL] = jnp.pad(kernel, widths)
  for name, value in (patch_embed or {}).items():
    leaves[f"patch_embed/{name}"] = value
  shapes = {n: tuple(x.shape) for n, x in leaves.items() if x is not None}
  differences.require_equal(target, shapes, "the assembled model")
  return flax.traverse_util.unflatten_dict(leaves, sep="/")
