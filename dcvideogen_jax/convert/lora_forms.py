"""Forms of adapters: their tensors, ranks and shapes, and how they change W.

A weight W has PyTorch's shape (out, in, *kernel). Its change is, by form and
before the factor alpha / rank,

- LoRA (arXiv 2106.09685): up @ down, of convolutions with Tucker's core `mid`
  between them,
- LoHa (arXiv 2108.06098): (w1_a @ w1_b) * (w2_a @ w2_b),
- LoKr (arXiv 2309.14859): the Kronecker product of w1 and w2, each whole or a
  product of two factors,
- (IA)3 (arXiv 2205.05638): W itself, scaled by row or by column.

The names and shapes are those of LyCORIS (KohakuBlueleaf/LyCORIS commit
f49d30d, `lycoris/modules/`) and of PEFT 0.21 (`peft/tuners/`).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax.convert import naming

Shape = naming.Shape
# Role of a tensor -> its shape.
Shapes = Mapping[str, Shape]
Weight = Float[Array, "out in *kernel"]

MAGNITUDES = ("dora_scale", "lora_magnitude_vector")


class Form(NamedTuple):
  """One form of adapter.

  Attributes:
    roles: roles of its tensors, beside alpha and the magnitude of DoRA; one of
      them makes a module an adapter of this form.
    rank: gives the rank of factors with these shapes, 0 if they are missing;
      None if no tensor is a factor of low rank.
    shapes: gives the shapes that the tensors of a weight should have, from
      those that are found and the weight's.
    product: makes the change before alpha / rank, from tensors by role and the
      weight's shape; None for (IA)3, whose change is `scaled`.
  """

  roles: tuple[str, ...]
  rank: Callable[[Shapes], int | None]
  shapes: Callable[[Shapes, Shape], dict[str, Shape]]
  product: Callable[[Mapping[str, Array], Shape], Weight] | None


def magnitude_shape(role: str, found: Shape, weight: Shape) -> Shape:
  """Returns the shape that DoRA's magnitude should have, nearest to a found.

  Args:
    role: `dora_scale` of LyCORIS and kohya: a magnitude per row, (out, 1) or
      (out,), or per column, (1, in); or `lora_magnitude_vector` of PEFT and
      diffusers: one per row, (out,), with further axes of 1 for convolutions.
    found: the shape of the tensor.
    weight: the shape of the weight.
  """
  rows = (weight[0], *(1 for _ in weight[1:]))
  columns = (1, weight[1], *(1 for _ in weight[2:]))
  allowed = [rows, columns, weight[:1]]
  if role == "lora_magnitude_vector":
    allowed = [weight[:1], rows, (1, *weight[:1], *rows[2:])]
  return found if found in allowed else allowed[0]


def scale_shape(role: str, found: Shape, weight: Shape) -> Shape:
  """Returns the shape that the vector of (IA)3 should have, nearest to a found.

  Args:
    role: `ia3_l` of PEFT: (out, 1) scales outputs and (1, in) inputs, of a
      convolution (1, out or in, 1, 1, 1); or `weight` of LyCORIS: (out or in,),
      of a convolution as PEFT's.
    found: the shape of the tensor.
    weight: the shape of the weight.
  """
  ones = tuple(1 for _ in weight[2:])
  allowed = [(1, weight[0], *ones), (1, weight[1], *ones)]
  if role == "weight":
    allowed = [weight[:1], weight[1:2], *(allowed if ones else [])]
  elif not ones:
    allowed[0] = (weight[0], 1)
  return found if found in allowed else allowed[0]


def _axis(found: Shapes, role: str, axis: int) -> int:
  """Returns an axis of a tensor; 0 if the tensor or the axis is missing."""
  shape = found.get(role, ())
  return shape[axis] if axis < len(shape) else 0


# --- LoRA --------------------------------------------------------------------


def _lora_rank(found: Shapes) -> int:
  if found.get("down"):
    return found["down"][0]
  return _axis(found, "up", 1)


def _lora_shapes(found: Shapes, weight: Shape) -> dict[str, Shape]:
  rank = _lora_rank(found)
  inside = weight[1:]
  shapes = {}
  if "mid" in found:
    shapes["mid"] = (rank, rank, *weight[2:])
    inside = (weight[1], *(1 for _ in weight[2:]))
  # The up factor of a convolution has kernel axes of size 1 at its end.
  up = (weight[0], rank, *(1 for _ in found.get("up", ())[2:]))
  return {"down": (rank, *inside), "up": up, **shapes}


def _lora_product(tensors: Mapping[str, Array], shape: Shape) -> Weight:
  down, up = (_matrix(tensors[role]) for role in ("down", "up"))
  if "mid" in tensors:
    return _tucker(tensors["mid"], up.T, down)
  return _matmul(up, down).reshape(shape)


def _matrix(x: Array) -> Float[Array, "rows columns"]:
  return x.reshape(len(x), -1)


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision="highest")


def _tucker(core: Array, a: Array, b: Array) -> Weight:
  """Multiplies a core (r, s, *kernel) by a (r, out) and b (s, in)."""
  return jnp.einsum("rs...,ro,si->oi...", core, a, b, precision="highest")


# --- LoHa --------------------------------------------------------------------


def _loha_rank(found: Shapes) -> int:
  return _axis(found, "hada_w1_b", 0)


def _loha_shapes(found: Shapes, weight: Shape) -> dict[str, Shape]:
  rank = _loha_rank(found)
  out, inside = weight[0], math.prod(weight[1:])
  if {"hada_t1", "hada_t2"} & found.keys():
    core = (rank, rank, *weight[2:])
    a, b = (rank, out), (rank, weight[1])
    cores = {"hada_t1": core, "hada_t2": core}
  else:
    a, b, cores = (out, rank), (rank, inside), {}
  sides = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
  return {**sides, **cores}


def _loha_product(tensors: Mapping[str, Array], shape: Shape) -> Weight:
  def side(i):
    a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
    if f"hada_t{i}" in tensors:
      return _tucker(tensors[f"hada_t{i}"], a, b)
    return _matmul(a, b).reshape(shape)

  return side(1) * side(2)


# --- LoKr --------------------------------------------------------------------


def _lokr_rank(found: Shapes) -> int | None:
  if "lokr_w2" not in found:
    return _axis(found, "lokr_w2_b", 0)
  return None if "lokr_w1" in found else _axis(found, "lokr_w1_b", 0)


def _lokr_shapes(found: Shapes, weight: Shape) -> dict[str, Shape]:
  rank = _lokr_rank(found) or 0
  out, inside, *kernel = weight
  first = "lokr_w1" in found
  sizes = ("lokr_w1", "lokr_w1") if first else ("lokr_w1_a", "lokr_w1_b")
  # The first factor's sizes have to divide those of the weight.
  rows = math.gcd(out, _axis(found, sizes[0], 0))
  columns = math.gcd(inside, _axis(found, sizes[1], 1))
  shapes: dict[str, Shape] = {"lokr_w1": (rows, columns)}
  if not first:
    shapes = {"lokr_w1_a": (rows, rank), "lokr_w1_b": (rank, columns)}
  out, inside = out // rows, inside // columns
  if "lokr_w2" in found:
    return {**shapes, "lokr_w2": (out, inside, *kernel)}
  if "lokr_t2" in found:
    second = {"lokr_w2_a": (rank, out), "lokr_w2_b": (rank, inside)}
    return {**shapes, **second, "lokr_t2": (rank, rank, *kernel)}
  inside *= math.prod(kernel)
  return {**shapes, "lokr_w2_a": (out, rank), "lokr_w2_b": (rank, inside)}


def _lokr_product(tensors: Mapping[str, Array], shape: Shape) -> Weight:
  def side(i):
    if f"lokr_w{i}" in tensors:
      return tensors[f"lokr_w{i}"]
    a, b = tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"]
    if f"lokr_t{i}" in tensors:
      return _tucker(tensors[f"lokr_t{i}"], a, b)
    return _matmul(a, b)

  # The kernel's axes belong to the second factor, as its last ones.
  return jnp.kron(side(1), _matrix(side(2))).reshape(shape)


# --- (IA)3 -------------------------------------------------------------------


def _no_rank(_: Shapes) -> None:
  """Returns None: a vector has no rank."""


def _ia3_shapes(found: Shapes, weight: Shape) -> dict[str, Shape]:
  if "ia3_l" in found:
    return {"ia3_l": scale_shape("ia3_l", found["ia3_l"], weight)}
  vector = scale_shape("weight", found.get("weight", ()), weight)
  return {"weight": vector, "on_input": ()}


IA3 = "(IA)3"
FORMS = {
  "LoRA": Form(("down", "up", "mid"), _lora_rank, _lora_shapes, _lora_product),
  "LoHa": Form(
    (*(f"hada_w{i}_{x}" for i in "12" for x in "ab"), "hada_t1", "hada_t2"),
    _loha_rank,
    _loha_shapes,
    _loha_product,
  ),
  "LoKr": Form(
    (*(f"lokr_w{i}{x}" for i in "12" for x in ("", "_a", "_b")), "lokr_t2"),
    _lokr_rank,
    _lokr_shapes,
    _lokr_product,
  ),
  IA3: Form(("ia3_l", "on_input", "weight"), _no_rank, _ia3_shapes, None),
}
