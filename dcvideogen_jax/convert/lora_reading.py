"""Reads the updates of a model from the tensors of a file.

A name that is not the model's is an error, because an update that is left out
silently looks like bad training.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcvideogen_jax import differences, errors, tree
from dcvideogen_jax.convert import (
  engine,
  lora,
  lora_changes,
  lora_config,
  lora_forms,
  lora_names,
  naming,
  quantised,
)

# (update, rank) -> factor of the product of the update's tensors. The rank is
# None if none of them has it.
Scaling = Callable[[lora_names.Update, int | None], float]


def trainer_scaling(update: lora_names.Update, rank: int | None) -> float:
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
  description: lora_config.Description | None = None,
) -> lora.Lora:
  """Reads the updates of a model.

  Args:
    tensors: the tensors of a file.
    layouts: the model's tables; the names of one of them are used.
    expected: the parameter tree as `jax.ShapeDtypeStruct`s.
    what: the source, for messages.
    scaling: gives alpha / rank for updates without an `.alpha` tensor.
    scale: factor of all updates.
    description: what PEFT or diffusers tells about all updates.

  Raises:
    errors.UserError: lists every name that is not the model's, every factor
      whose counterpart is missing and every shape that does not fit; or names a
      tensor that has rank 0, is quantised, or is not finite, alone or times its
      scale. Also if the description is of other updates.
  """
  leaves = tree.shapes(expected)
  names = lora_names.parse(tensors, layouts, leaves)
  _require_shapes(
    lora_names.expected_shapes(names, tensors, leaves), tensors, what
  )
  if not tensors:
    raise errors.UserError(f"{what} holds no low-rank update")
  # Alpha and on_input may have an integer dtype. A factor of integers is
  # quantised.
  numbers = (".alpha", ".on_input")
  weights = [name for name in tensors if not name.endswith(numbers)]
  quantised.require_floats(what, tensors, weights)
  values = _Values(tensors, what, scaling, scale)
  pieces: dict[str, list[_Piece]] = {}
  changes: dict[str, list[lora_changes.Change]] = {}
  start = description.start if description else None
  if start is not None:
    warnings.warn(
      f"{what}: the start of the factors ({start}) is computed again from the"
      " weights, which have to be those of the base that it was trained on",
      stacklevel=2,
    )
  for update in names.updates:
    if description is not None:
      description.require_of(update)
    if start is None and _is_plain(update):
      piece = _piece(values, update)
      pieces.setdefault(update.place.jax, []).append(piece)
      continue
    for change in _changes(values, update, leaves, start):
      changes.setdefault(change.slot.jax, []).append(change)
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
  return lora.Lora(factors, deltas, len(tensors), source=what, changes=changes)


def _require_shapes(
  expected: Mapping[str, naming.Shape],
  tensors: lora_names.Tensors,
  what: str,
) -> None:
  """Raises UserError, with a hint if only the interface differs."""
  found = {name: tensor.shape for name, tensor in tensors.items()}
  try:
    differences.require_equal(expected, found, f"{what}: the update")
  except errors.UserError as e:
    wrong = {n for n in found if expected.get(n) != tuple(found[n])}
    if not wrong or not all(map(lora_names.is_interface, wrong)):
      raise
    raise errors.UserError(
      f"{e}; it is of a model with another latent space:"
      f" skip={lora_names.INTERFACE} leaves these tensors out"
    ) from None


def _is_plain(update: lora_names.Update) -> bool:
  """Whether an update is LoRA, a product of two factors, and nothing else."""
  rest = {*lora_forms.MAGNITUDES, "mid"} & update.names.keys()
  return update.form == "LoRA" and not rest


def _piece(values: "_Values", update: lora_names.Update) -> "_Piece":
  """Reads a plain update."""
  down, up = (update.name(role) for role in ("down", "up"))
  a = update.place.rule.layout.to_jax(values.of(down))
  array = values.of(up)
  b = values.scaled(up, array.reshape(len(array), -1).T, update)
  return _Piece(update.place, a, b)


def _changes(
  values: "_Values",
  update: lora_names.Update,
  leaves: Mapping[str, naming.Shape],
  start: str | None,
) -> list[lora_changes.Change]:
  """Reads an update of any form: the changes of a weight, and of its bias."""
  shape = update.place.torch_shape(leaves[update.place.jax])
  if update.form == lora_forms.IA3:
    return _scaled_by(values, update, shape)
  arrays = {
    role: values.of(name)
    for role, name in update.names.items()
    if role in lora_forms.FORMS[update.form].roles
  }
  numbers = {"scale": values.scale, "factor": values.factor(update, 1.0)}
  if (role := update.magnitude) is not None:
    magnitude = values.of(update.name(role))
    rows = (len(magnitude), 1) if magnitude.ndim == 1 else magnitude.shape
    if role == "lora_magnitude_vector":
      rows = (magnitude.size, 1)
    rows = (*rows[:2], *(1 for _ in shape[2:]))
    # LyCORIS adds the smallest step of float32 to the norms, PEFT nothing.
    eps = np.finfo(np.float32).eps if role == "dora_scale" else 0.0
    arrays["magnitude"] = magnitude.reshape(rows)
    numbers["eps"] = float(eps)
  arrays |= {n: np.asarray(x, np.float32) for n, x in numbers.items()}
  rank = values.rank(update) or 0
  place, form = update.place, update.form
  return [lora_changes.Change(place, form, arrays, rank, start)]


def _scaled_by(
  values: "_Values", update: lora_names.Update, shape: naming.Shape
) -> list[lora_changes.Change]:
  """Reads the vector of (IA)3, as it multiplies a weight of this shape.

  PEFT's vector starts at 1, and if it scales outputs it also scales the bias.
  LyCORIS adds 1 to its vector, and leaves the bias.
  """
  peft = "ia3_l" in update.names
  name = update.name("ia3_l" if peft else "weight")
  vector = values.of(name)
  out, inside, *kernel = shape
  on_input = vector.size != out
  if not peft:
    on_input = bool(values.of(update.name("on_input")).item())
  elif vector.ndim == 2:
    on_input = vector.shape[0] == 1 and out > 1
  elif out == inside:
    raise errors.UserError(
      f"{values.what}: {name} may scale the inputs or the outputs of"
      f" {update.module}, which has {out} of both"
    )
  if vector.size != (inside if on_input else out):
    raise errors.UserError(
      f"{values.what}: {name} has {vector.size} numbers for {update.module},"
      f" which has {inside} inputs and {out} outputs"
    )
  by = vector.reshape(-1) - np.float32(peft)
  ends = (1, -1) if on_input else (-1, 1)
  arrays = {
    "vector": by.reshape(*ends, *(1 for _ in kernel)),
    "scale": np.asarray(values.scale, np.float32),
  }
  change = lora_changes.Change(update.place, update.form, arrays)
  if on_input or not peft or update.bias is None:
    return [change]
  arrays = {**arrays, "vector": by}
  return [change, lora_changes.Change(update.bias, update.form, arrays)]


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
    by = self.factor(update, self.scale) if update else self.scale
    with np.errstate(over="ignore", invalid="ignore"):
      product = array * np.float32(by)
    if not engine.finite(product):
      raise errors.UserError(
        f"{self.what}: {name} times its scale of {by:g} is not finite"
      )
    return product

  def rank(self, update: lora_names.Update) -> int | None:
    """Returns the rank of an update's factors; None if none is of low rank."""
    shapes = {r: self.tensors[n].shape for r, n in update.names.items()}
    rank = lora_forms.FORMS[update.form].rank(shapes)
    if rank == 0:
      first = next(iter(update.names.values()))
      raise errors.UserError(f"{self.what}: {first} has rank 0")
    return rank

  def factor(self, update: lora_names.Update, scale: float) -> float:
    """Returns alpha / rank, or what takes its place, times a scale.

    LyCORIS has no such factor where both factors of LoKr are whole, whatever
    `.alpha` says.
    """
    rank = self.rank(update)
    if "alpha" not in update.names:
      return scale * self.scaling(update, rank)
    if rank is None:
      return scale
    return scale * self.of(update.names["alpha"]).item() / rank


class _Piece(NamedTuple):
  """The factors of one slot of a kernel."""

  place: naming.TensorSlot
  a: np.ndarray
  b: np.ndarray


def _assemble(shape: naming.Shape, pieces: Sequence[_Piece]) -> lora.Factors:
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
