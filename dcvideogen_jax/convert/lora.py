"""Low-rank updates (LoRA, arXiv 2106.09685) and other adapters of a model.

They are merged into the weights, or LoRA is computed apart from them.
`lora_reading` reads them, and `lora_names` lists the files that are understood.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, tree
from dcvideogen_jax.convert import lora_changes, rounding

Factors = tuple[np.ndarray, np.ndarray]


class Lora(NamedTuple):
  """Updates of a model's parameters, by JAX name, in float32.

  Attributes:
    factors: name of a kernel -> the factors a and b. a has the kernel's shape,
      but the rank on its last axis; b is (rank, out), with a leading axis of
      layers if the kernel has one. The update is `a @ b`, with scales included;
      zeros fill smaller ranks and layers without an update.
    deltas: name of a parameter -> array of the same shape that is added to it.
    matched: number of tensors of the source that were read.
    whole: name of a parameter -> array of the same shape that replaces it, from
      files with modules that were trained as a whole.
    source: the source of the updates, for messages.
    changes: name of a parameter -> changes that have no such factors, or that
      depend on the parameter.
    skipped: number of tensors of the source that were left out as asked.
  """

  factors: dict[str, Factors]
  deltas: dict[str, np.ndarray]
  matched: int
  whole: Mapping[str, np.ndarray] = {}
  source: str = "the low-rank updates"
  changes: Mapping[str, Sequence[lora_changes.Change]] = {}
  skipped: int = 0

  @property
  def rank(self) -> int:
    """The largest rank of the factors; 0 without factors."""
    ranks = [a.shape[-1] for a, _ in self.factors.values()]
    ranks += [x.rank for found in self.changes.values() for x in found]
    return max(ranks, default=0)

  @property
  def changed(self) -> set[str]:
    """The names of the parameters that change."""
    return {*self.factors, *self.deltas, *self.whole, *self.changes}


def add(loras: Sequence[Lora]) -> Lora:
  """Adds several updates into one.

  Raises:
    errors.UserError: if two of them replace the same parameter.
  """
  factors: dict[str, Factors] = {}
  deltas: dict[str, np.ndarray] = {}
  whole: dict[str, np.ndarray] = {}
  changes: dict[str, list[lora_changes.Change]] = {}
  for lora in loras:
    if twice := sorted(whole.keys() & lora.whole.keys()):
      raise errors.UserError(
        f"two updates replace {', '.join(twice)}: expected at most one"
      )
    whole.update(lora.whole)
    for name, (a, b) in lora.factors.items():
      if name in factors:
        a = np.concatenate([factors[name][0], a], axis=-1)
        b = np.concatenate([factors[name][1], b], axis=-2)
      factors[name] = (a, b)
    for name, delta in lora.deltas.items():
      deltas[name] = deltas[name] + delta if name in deltas else delta
    for name, found in lora.changes.items():
      changes.setdefault(name, []).extend(found)
  matched = sum(lora.matched for lora in loras)
  sources = " and ".join(dict.fromkeys(lora.source for lora in loras))
  skipped = sum(lora.skipped for lora in loras)
  return Lora(factors, deltas, matched, whole, sources, changes, skipped)


def merge(params: Any, lora: Lora, donate: bool = False) -> Any:
  """Adds an update to parameters, in float32, and casts them back.

  Parameters that the update holds as a whole are replaced first. Changes that
  depend on a parameter (`lora_changes`) are computed from its value before
  anything is added.

  Args:
    params: the parameters of the model that `lora` was read for.
    lora: the update.
    donate: whether the memory of changed parameters may be reused, which makes
      `params` unusable.

  Returns:
    The parameter tree. Unchanged parameters are the same arrays; dtypes and
    shardings are kept.

  Raises:
    errors.UserError: names the parameters that would hold NaN or infinity, or
      that are in eight bits.
  """
  leaves = tree.flatten(params)
  finite: dict[str, list[Any]] = {}
  for name in sorted(lora.changed):
    rounding.require_plain(f"{lora.source}: {name}", leaves[name].dtype)

  def update(name, function, *operands):
    leaf = jnp.asarray(leaves[name])
    merged = jax.jit(
      _with_check(function),
      out_shardings=(leaf.sharding, None),
      donate_argnums=(0,) if donate else (),
    )
    leaves[name], good = merged(leaf, *operands)
    finite.setdefault(name, []).append(good)

  for name, value in lora.whole.items():
    update(name, _replace, value)
  for name, changes in lora.changes.items():
    leaf = jnp.asarray(leaves[name])
    if not donate and name not in lora.whole:
      leaf = jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
    leaves[name], good = lora_changes.apply(leaf, changes)
    finite.setdefault(name, []).append(good)
  for name, (a, b) in lora.factors.items():
    update(name, _add_product, a, b)
  for name, delta in lora.deltas.items():
    update(name, _add, delta)
  if wrong := [name for name, good in finite.items() if not all(good)]:
    raise errors.UserError(
      f"{lora.source}: with the updates added, {', '.join(wrong)} would hold"
      " NaN or infinity"
    )
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


@functools.cache
def _with_check(function):
  """Makes `function` also return whether its result is finite."""

  def checked(*operands):
    merged = function(*operands)
    return merged, jnp.isfinite(merged).all()

  return checked


def _replace(w, value):
  return value.astype(w.dtype)


def _add(w, delta):
  return (w.astype(jnp.float32) + delta).astype(w.dtype)


def _add_product(w, a, b):
  """Returns w + a @ b, layer by layer: one layer at a time is in float32."""

  def one(operands):
    w, a, b = operands
    return _add(w, jnp.matmul(a, b, precision="highest"))

  return jax.lax.map(one, (w, a, b)) if b.ndim == 3 else one((w, a, b))


def collection(lora: Lora, expected: Any) -> dict[str, Any]:
  """Converts an update to the collection "lora" of `layers.Dense`.

  Args:
    lora: the update that the model computes apart from its weights.
    expected: the collection as `jax.ShapeDtypeStruct`s, of a model with
      `lora_rank` and `lora_alpha` equal to `lora.rank`.

  Raises:
    errors.UserError: if an update belongs to a layer that cannot keep it apart.
  """
  values = {
    name: np.zeros(leaf.shape, leaf.dtype)
    for name, leaf in tree.flatten(expected).items()
  }
  unmatched = {*lora.deltas, *lora.whole, *lora.changes}
  for name, (a, b) in lora.factors.items():
    module = name.removesuffix("/kernel")
    if f"{module}/a" not in values:
      unmatched.add(name)
      continue
    values[f"{module}/a"][..., : a.shape[-1]] = a
    values[f"{module}/b"][..., : b.shape[-2], :] = b
  if unmatched:
    raise errors.UserError(
      f"the updates of {len(unmatched)} parameters can only be merged, not kept"
      f" apart: {', '.join(sorted(unmatched))}"
    )
  return flax.traverse_util.unflatten_dict(
    {name: jnp.asarray(value) for name, value in values.items()}, sep="/"
  )


def from_collection(variables: Mapping[str, Any], alpha: float) -> Lora:
  """Converts the collection "lora" of `layers.Dense` to an update.

  This is the inverse of `collection`: `merge` can then add to the weights what
  `layers.Dense` computes apart.

  Args:
    variables: the collection, `a` (in, rank) and `b` (rank, out) by module,
      with a leading axis of layers if the module has one.
    alpha: the model's `lora_alpha`; its `lora_rank` is the rank of the factors.
  """
  leaves = {
    n: np.asarray(x, np.float32) for n, x in tree.flatten(variables).items()
  }
  factors = {}
  for name in leaves:
    module, _, factor = name.rpartition("/")
    if factor == "a":
      a, b = leaves[name], leaves[f"{module}/b"]
      factors[f"{module}/kernel"] = (a, b * np.float32(alpha / a.shape[-1]))
  return Lora(factors, {}, len(leaves))
