"""Changes of weights that depend on the weights, or whose product is no LoRA.

A trained module computes with

    V = W - start + alpha / rank * product
    W' = magnitude * V / |V|            (DoRA, arXiv 2402.09353; else V)

where `product` is that of the adapter's form (`lora_forms`), and `start` is
what PEFT takes off the base for PiSSA (arXiv 2404.02948) or OLoRA (arXiv
2406.01775). The change is scale * (W' - W). Changes of one weight are each
computed from the weight as it was, and added, so their order does not matter.

ComfyUI applies a scale to the whole change too. LyCORIS and PEFT let the scale
of DoRA alter V or its norm only, and do not give W at a scale of 0.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcvideogen_jax.convert import lora_forms, naming

# Ways in which PEFT starts from factors of the base, which can be repeated.
STARTS = ("pissa", "olora")


class Change(NamedTuple):
  """A change of one PyTorch tensor: a parameter, a layer or a part of one.

  Attributes:
    slot: the tensor and the parameter that it fills.
    form: key of `lora_forms.FORMS`.
    tensors: role -> array in float32: the form's tensors; "factor", alpha /
      rank; "scale"; "magnitude", that of DoRA, (out, 1, ...) or (1, in, ...),
      and "eps", which is added to the norms; "vector", that of (IA)3, as it
      multiplies the tensor.
    rank: the rank of the factors; 0 without any.
    start: one of `STARTS`, or None.
  """

  slot: naming.TensorSlot
  form: str
  tensors: Mapping[str, np.ndarray]
  rank: int = 0
  start: str | None = None


def apply(leaf: Any, changes: Sequence[Change]) -> tuple[Array, Array]:
  """Adds changes to a parameter, tensor by tensor, in float32.

  Args:
    leaf: the parameter. Its memory is used again.
    changes: the parameter's changes.

  Returns:
    The parameter, with the dtype and sharding of `leaf`, and whether all that
    has changed is finite.
  """
  by_slot: dict[Any, list[Change]] = {}
  for change in changes:
    by_slot.setdefault((change.slot.layer, change.slot.rule), []).append(change)
  finite = []
  for (layer, rule), found in by_slot.items():
    function = _compiled(
      rule.layout,
      rule.part,
      layer is not None,
      tuple((change.form, change.start, change.rank) for change in found),
      leaf.sharding,
    )
    tensors = tuple(dict(change.tensors) for change in found)
    leaf, good = function(leaf, np.int32(layer or 0), tensors)
    finite.append(good)
  return leaf, jnp.stack(finite).all()


@functools.cache
def _compiled(layout, part, stacked, kinds, sharding):
  """Compiles the change of one tensor of a parameter.

  Returns:
    (parameter, layer, tensors by role of each change) -> the parameter, and
    whether what has changed is finite.
  """

  def function(leaf, layer, tensors):
    start = [0] * leaf.ndim
    size = [*leaf.shape]
    if stacked:
      start[0], size[0] = layer, 1
    if part is not None:
      k, n = part
      size[-1] //= n
      start[-1] = k * size[-1]
    found = jax.lax.dynamic_slice(leaf, start, size)
    weight = found[0] if stacked else found
    weight = _to_torch(layout, weight.astype(jnp.float32))
    total = weight
    for (form, origin, rank), x in zip(kinds, tensors, strict=True):
      total += x["scale"] * _change(weight, form, origin, rank, x)
    total = _to_jax(layout, total).reshape(size).astype(leaf.dtype)
    leaf = jax.lax.dynamic_update_slice(leaf, total, start)
    return leaf, jnp.isfinite(total).all()

  return jax.jit(function, donate_argnums=0, out_shardings=(sharding, None))


def _change(weight, form, origin, rank, tensors):
  """Returns the change of a weight (out, in, *kernel), or of a bias (out,)."""
  if form == lora_forms.IA3:
    return weight * tensors["vector"]
  product = lora_forms.FORMS[form].product(tensors, weight.shape)
  change = tensors["factor"] * product
  if origin is not None:
    matrix = weight.reshape(len(weight), -1)
    taken = _START[origin](matrix, rank, tensors["factor"])
    change -= taken.reshape(weight.shape)
  if "magnitude" in tensors:
    magnitude = tensors["magnitude"]
    axes = tuple(i for i, n in enumerate(magnitude.shape) if n == 1)
    new = weight + change
    norm = jnp.sqrt(jnp.square(new).sum(axes, keepdims=True))
    change = new * (magnitude / (norm + tensors["eps"])) - weight
  return change


def _pissa(
  matrix: Float[Array, "out in"], rank: int, factor: Array
) -> Float[Array, "out in"]:
  """Returns the `rank` largest singular parts, which PiSSA takes off.

  PEFT divides its factors by `factor`, which therefore cancels.
  """
  del factor
  u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
  scaled = u[:, :rank] * s[None, :rank]
  return jnp.matmul(scaled, v[:rank], precision="highest")


def _olora(
  matrix: Float[Array, "out in"], rank: int, factor: Array
) -> Float[Array, "out in"]:
  """Returns the first `rank` columns of Q times rows of R, times `factor`.

  Those of Q follow from the same columns of the matrix.
  """
  q, _ = jnp.linalg.qr(matrix[:, :rank])
  r = jnp.matmul(q.T, matrix, precision="highest")
  return factor * jnp.matmul(q, r, precision="highest")


_START = {"pissa": _pissa, "olora": _olora}


def _to_torch(layout: naming.Layout, x: Array) -> Array:
  """Returns a tensor in JAX's layout with PyTorch's axes."""
  if layout.axes is not None:
    x = x.transpose(np.argsort(layout.axes))
  return jnp.expand_dims(x, layout.squeezed_axes)


def _to_jax(layout: naming.Layout, x: Array) -> Array:
  """Returns a tensor with PyTorch's axes in JAX's layout."""
  x = x.squeeze(layout.squeezed_axes)
  return x if layout.axes is None else x.transpose(layout.axes)
