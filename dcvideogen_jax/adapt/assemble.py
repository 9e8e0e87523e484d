"""Assembles a transformer for new latents from a trained transformer.

Follows DC-Gen `applications/dc_videogen/wan_{t2v,i2v}_assemble.py` (commit
562077c): all parameters are copied except those of the patch embedding and the
output projection. The official code does not make an image-to-video model from
a text-to-video one; this module does.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp

from dcvideogen_jax import differences, errors
from dcvideogen_jax.models import wan_dit

Shapes = Mapping[str, tuple[int, ...]]

# Parameters that depend on the latent space.
_SPACE = re.compile(r"patch_embed/.*|head/.*")
# Parameters that only image-to-video models have.
_IMAGE = re.compile(
  r"image_embed/.*|blocks/cross_attn/(k_img|v_img|norm_k_img)/.*"
)
# The value projection of the attention to the image: zeros leave the output of
# the model as it is.
_ZERO_INITIALISED = re.compile(r"blocks/cross_attn/v_img/.*")
_KERNEL = "patch_embed/kernel"


def for_latent_space(name: str) -> bool:
  """Whether the parameter of this name depends on the latent space."""
  return bool(_SPACE.fullmatch(name))


def require_compatible(
  target: wan_dit.WanDiT, source: wan_dit.WanDiT, same_space: bool
) -> None:
  """Compares the fields of two models that parameter shapes do not tell.

  Args:
    target: the model that is assembled.
    source: the trained model, whose parameters are copied.
    same_space: whether both models have the same latent space.

  Raises:
    errors.UserError: if the models differ in `heads` or `eps` or, with the same
      latent space, in `patch` or `rope_scale`.
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
  """Returns the names of the parameters that are not copied.

  Args:
    target: name -> shape of the parameters that are assembled.
    source: name -> shape of the trained model's parameters.
    same_space: whether both models have the same latent space, so that patch
      embedding and output projection are copied too.

  Raises:
    errors.UserError: lists the parameters that have to be copied and are
      missing, unexpected or of another shape.
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
  """Whether the target's kernel adds just the mask and condition channels."""
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
  """Assembles the parameters of the target.

  Added input channels of the patch embedding get zeros, and so does a new value
  projection of the attention to the image. An image-to-video model therefore
  starts with the output of the text-to-video model that it is made from.

  Args:
    target: name -> shape of the parameters that are assembled.
    source: name -> array of the trained model's parameters; those that the
      target does not have are left out.
    new: name -> initial array of each parameter in `new_parameters`.
    patch_embed: "kernel" and "bias" from the first phase, instead of new ones.

  Returns:
    The nested parameter tree. Copied parameters share the source's arrays.

  Raises:
    errors.UserError: if a parameter is missing or has another shape than the
      target's.
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
