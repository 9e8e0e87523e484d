"""Low-rank updates (LoRA, arXiv 2106.09685): read, merged or kept apart.

`lora_names` tells which files are understood. A name that is nothing of the
model is an error: updates that are silently left out look like bad training.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import engine, lora_names, naming, quantised

# An update and its rank -> what its product is multiplied by.
Scaling = Callable[[lora_names.Update, int], float]
Factors = tuple[np.ndarray, np.ndarray]


class Lora(NamedTuple):
  """Updates of a model's parameters, by our names, in float32.

  Attributes:
    factors: name of a kernel -> a, of the kernel's shape but for the rank on
      its last axis, and b (rank, out), with a leading axis of layers where the
      kernel has it. The update is `a @ b`; scales are contained, and smaller
      ranks and layers without an update are filled with zeros.
    deltas: name of a parameter -> what is added to it, of the same shape.
    matched: how many tensors of the source these come from.
    whole: name of a parameter -> what takes its place, of the same shape; from
      files with modules that were trained as a whole.
    source: where these come from, for messages.
  """

  factors: dict[str, Factors]
  deltas: dict[str, np.ndarray]
  matched: int
  whole: Mapping[str, np.ndarray] = {}
  source: str = "the low-rank updates"

  @property
  def rank(self) -> int:
    """The largest rank."""
    return max((a.shape[-1] for a, _ in self.factors.values()), default=0)


def trainer_scaling(update: lora_names.Update, rank: int) -> float:
  """What DC-VideoGen trains and merges with: alpha is twice the rank.

  Its files do not say so (DC-Gen `convert_lora_into_base.py`, commit 562077c).
  """
  del update, rank
  return 2.0


def unknown_scaling(what: str) -> Scaling:
  """That of files which do not say alpha: the rank, as others read them too.

  Args:
    what: names the file, for the one warning.
  """

  @functools.cache
  def warn():
    warnings.warn(
      f"{what}: no alpha is known, so it is taken to be the rank",
      stacklevel=2,
    )

  def scaling(update, rank):
    del update, rank
    warn()
    return 1.0

  return scaling


def read(
  tensors: lora_names.Tensors,
  layouts: Mapping[str, Sequence[naming.Rule]],
  expected: Any,
  what: str,
  scaling: Scaling,
  scale: float = 1.0,
) -> Lora:
  """Reads updates of a model.

  Args:
    tensors: what a file holds.
    layouts: tables of the model; the names of one of them are used.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.
    what: what is read, for messages.
    scaling: for updates that have no `.alpha` tensor, which stands for
      alpha / rank.
    scale: multiplies everything.

  Raises:
    errors.UserError: lists every name that is nothing of the model, every
      missing half and every shape that does not fit; or names the tensor that
      is not finite, times its scale, that has rank 0, or that is quantised.
  """
  leaves = tree.shapes(expected)
  names = lora_names.parse(tensors, layouts, leaves)
  differences.require_equal(
    lora_names.expected_shapes(names, tensors, leaves),
    {name: tensor.shape for name, tensor in tensors.items()},
    f"{what}: the update",
  )
  if not tensors:
    raise errors.UserError(f"{what} holds no low-rank update")
  # An alpha may be a whole number; a factor of whole numbers lacks its scales.
  weights = [name for name in tensors if not name.endswith(".alpha")]
  quantised.require_floats(what, tensors, weights)
  values = _Values(tensors, what, scaling, scale)
  pieces: dict[str, list[_Piece]] = {}
  for update in names.updates:
    a = update.place.rule.layout.to_jax(values.of(update.down))
    up = values.of(update.up)
    b = values.scaled(update.up, up.reshape(len(up), -1).T, update)
    pieces.setdefault(update.place.jax, []).append(_Piece(update.place, a, b))
  deltas: dict[str, np.ndarray] = {}
  for delta in names.deltas:
    shape = leaves[delta.place.jax]
    target = deltas.setdefault(delta.place.jax, np.zeros(shape, np.float32))
    array = values.of(delta.name).reshape(delta.place.torch_shape(shape))
    array = delta.place.rule.layout.to_jax(array)
    region = tuple(slice(*ends) for ends in delta.place.region(shape))
    array = values.scaled(delta.name, array, delta.of)
    target[region] += array.reshape(target[region].shape)
  factors = {n: _assemble(leaves[n], found) for n, found in pieces.items()}
  return Lora(factors, deltas, len(tensors), source=what)


class _Values(NamedTuple):
  """Reads tensors, checks them, and finds what updates are multiplied by."""

  tensors: lora_names.Tensors
  what: str
  scaling: Scaling
  scale: float

  def of(self, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # Of float64.
      array = np.asarray(self.tensors[name].read(), np.float32)
    if not engine.finite(array):
      raise errors.UserError(f"{self.what}: {name} holds NaN or infinity")
    return array

  def scaled(
    self, name: str, array: np.ndarray, update: lora_names.Update | None
  ) -> np.ndarray:
    """A tensor times its update's scale, or times that of everything."""
    by = self.factor(update) if update else self.scale
    with np.errstate(over="ignore", invalid="ignore"):
      product = array * np.float32(by)
    if not engine.finite(product):
      raise errors.UserError(
        f"{self.what}: {name} times its scale of {by:g} is not finite"
      )
    return product

  def factor(self, update: lora_names.Update) -> float:
    rank = self.tensors[update.down].shape[0]
    if not rank:
      raise errors.UserError(f"{self.what}: {update.down} has rank 0")
    if update.alpha is None:
      return self.scale * self.scaling(update, rank)
    return self.scale * self.of(update.alpha).item() / rank


class _Piece(NamedTuple):
  """The factors of one place of a kernel."""

  place: naming.TensorSlot
  a: np.ndarray
  b: np.ndarray


def _assemble(shape: naming.Shape, pieces: Sequence[_Piece]) -> Factors:
  """The factors of a whole kernel; parts of one layer have their own ranks."""
  used: dict[int | None, int] = {}
  starts = []
  for piece in pieces:
    starts.append(used.get(piece.place.layer, 0))
    used[piece.place.layer] = starts[-1] + len(piece.b)
  rank = max(used.values())
  stacked = pieces[0].place.layer is not None
  a = np.zeros((*shape[:-1], rank), np.float32)
  b = np.zeros((*shape[:1][: int(stacked)], rank, shape[-1]), np.float32)
  for start, piece in zip(starts, pieces, strict=True):
    ranks = slice(start, start + len(piece.b))
    layer = (piece.place.layer,) if stacked else ()
    a[(*layer, ..., ranks)] = piece.a
    b[(*layer, ranks, slice(*piece.place.region(shape)[-1]))] = piece.b
  return a, b


def add(loras: Sequence[Lora]) -> Lora:
  """One update that is the sum of several.

  Raises:
    errors.UserError: if two of them replace the same parameter.
  """
  factors: dict[str, Factors] = {}
  deltas: dict[str, np.ndarray] = {}
  whole: dict[str, np.ndarray] = {}
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
  matched = sum(lora.matched for lora in loras)
  sources = " and ".join(dict.fromkeys(lora.source for lora in loras))
  return Lora(factors, deltas, matched, whole, sources)


def merge(params: Any, lora: Lora, donate: bool = False) -> Any:
  """The parameters with the update added, in float32, then cast back.

  What the update holds as a whole takes its place first.

  Args:
    params: of the model that `lora` was read for.
    lora: what is added.
    donate: whether the memory of changed parameters may be used again, which
      makes `params` unusable.

  Returns:
    The tree, with unchanged parameters as they are; dtypes and shardings stay.

  Raises:
    errors.UserError: names parameters that would hold a NaN or an infinity.
  """
  leaves = tree.flatten(params)
  finite = {}

  def update(name, function, *operands):
    leaf = jnp.asarray(leaves[name])
    merged = jax.jit(
      _with_check(function),
      out_shardings=(leaf.sharding, None),
      donate_argnums=(0,) if donate else (),
    )
    leaves[name], finite[name] = merged(leaf, *operands)

  for name, value in lora.whole.items():
    update(name, _replace, value)
  for name, (a, b) in lora.factors.items():
    update(name, _add_product, a, b)
  for name, delta in lora.deltas.items():
    update(name, _add, delta)
  if wrong := [name for name, good in finite.items() if not good]:
    raise errors.UserError(
      f"{lora.source}: with the updates added, {', '.join(wrong)} would hold"
      " NaN or infinity"
    )
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


@functools.cache
def _with_check(function):
  """`function`, and whether what it gives is finite."""

  def checked(*operands):
    merged = function(*operands)
    return merged, jnp.isfinite(merged).all()

  return checked


def _replace(w, value):
  return value.astype(w.dtype)


def _add(w, delta):
  return (w.astype(jnp.float32) + delta).astype(w.dtype)


def _add_product(w, a, b):
  """w + a @ b, layer by layer: a single layer is in float32 at a time."""

  def one(operands):
    w, a, b = operands
    return _add(w, jnp.matmul(a, b, precision="highest"))

  return jax.lax.map(one, (w, a, b)) if b.ndim == 3 else one((w, a, b))


def collection(lora: Lora, expected: Any) -> dict[str, Any]:
  """The update as variables of the collection "lora" of `layers.Dense`.

  Args:
    lora: what the model shall compute apart from its weights.
    expected: the collection as `jax.ShapeDtypeStruct`s, of a model with
      `lora_rank=lora.rank`; its `lora_alpha` has to be that rank too.

  Raises:
    errors.UserError: if an update belongs to a layer that cannot keep it apart.
  """
  values = {
    name: np.zeros(leaf.shape, leaf.dtype)
    for name, leaf in tree.flatten(expected).items()
  }
  unmatched = {*lora.deltas, *lora.whole}
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
  """The update that the variables of the collection "lora" stand for.

  The inverse of `collection`: `merge` adds what `layers.Dense` computes apart.

  Args:
    variables: the collection, `a` (in, rank) and `b` (rank, out) by module,
      with a leading axis of layers where the model has one.
    alpha: `lora_alpha` of the model; `lora_rank` is that of the factors.
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
