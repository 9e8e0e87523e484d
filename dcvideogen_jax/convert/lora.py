"""Reads low-rank updates (LoRA, arXiv 2106.09685) to merge or keep apart.

`lora_names` lists the files that are understood. A name that is not the model's
is an error, because an update that is left out silently looks like bad
training.
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

# (update, rank) -> factor of the product of the update's two matrices.
Scaling = Callable[[lora_names.Update, int], float]
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
  """

  factors: dict[str, Factors]
  deltas: dict[str, np.ndarray]
  matched: int
  whole: Mapping[str, np.ndarray] = {}
  source: str = "the low-rank updates"

  @property
  def rank(self) -> int:
    """The largest rank of the factors; 0 without factors."""
    return max((a.shape[-1] for a, _ in self.factors.values()), default=0)


def trainer_scaling(update: lora_names.Update, rank: int) -> float:
  """Returns 2: DC-VideoGen trains and merges with an alpha of twice the rank.

  DC-VideoGen's files do not hold alpha (DC-Gen `convert_lora_into_base.py`,
  commit 562077c).
  """
  del update, rank
  return 2.0


def unknown_scaling(what: str) -> Scaling:
  """Returns the scaling of files without alpha: alpha is taken to be the rank.

  Other libraries read such files in the same way.

  Args:
    what: the file, for the one warning that is given.
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
  """Reads the updates of a model.

  Args:
    tensors: the tensors of a file.
    layouts: the model's tables; the names of one of them are used.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.
    what: the source, for messages.
    scaling: gives alpha / rank for updates without an `.alpha` tensor.
    scale: factor of all updates.

  Raises:
    errors.UserError: lists every name that is not the model's, every factor
      whose counterpart is missing and every shape that does not fit; or names a
      tensor that has rank 0, is quantised, or is not finite, alone or times its
      scale.
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
  # Alpha may have an integer dtype. A factor of integers is quantised.
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
  """Reads and checks tensors, and computes the factors of updates."""

  tensors: lora_names.Tensors
  what: str
  scaling: Scaling
  scale: float

  def of(self, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 may overflow; checked below.
      array = np.asarray(self.tensors[name].read(), np.float32)
    if not engine.finite(array):
      raise errors.UserError(f"{self.what}: {name} holds NaN or infinity")
    return array

  def scaled(
    self, name: str, array: np.ndarray, update: lora_names.Update | None
  ) -> np.ndarray:
    """Multiplies a tensor by its update's factor; without one, by `scale`."""
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
  """The factors of one slot of a kernel."""

  place: naming.TensorSlot
  a: np.ndarray
  b: np.ndarray


def _assemble(shape: naming.Shape, pieces: Sequence[_Piece]) -> Factors:
  """Assembles the factors of a kernel; its parts may have different ranks."""
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
  """Adds several updates into one.

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
  """Adds an update to parameters, in float32, and casts them back.

  Parameters that the update holds as a whole are replaced first.

  Args:
    params: the parameters of the model that `lora` was read for.
    lora: the update.
    donate: whether the memory of changed parameters may be reused, which makes
      `params` unusable.

  Returns:
    The parameter tree. Unchanged parameters are the same arrays; dtypes and
    shardings are kept.

  Raises:
    errors.UserError: names the parameters that would hold NaN or infinity.
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
