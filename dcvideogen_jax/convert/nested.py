"""Finds the weights in the nested dictionaries of a trainer's `.pt` file.

Trainers nest dictionaries: weights beside their EMA, optimiser states, counters
and settings. The keys of nested dictionaries become prefixes of the names of
tensors, in which `wrappings` finds the names of the model.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.convert import reading

# Limits of the depth of nesting, and of the entries of all dictionaries.
_DEEPEST = 16
_MOST = 1_000_000


def state_dict(path: pathlib.Path, loaded: Any) -> dict[str, reading.Tensor]:
  """Lists the weights in the contents of a `.pt` file, by name.

  If the contents have a `model_state_dict` or a `state_dict`, only its tensors
  are listed. Leading keys that all tensors share are not part of their names.
  EMA weights (`ema_model_state_dict`, a single entry, as in DC-VideoGen's
  files) replace those of the same name in `model_state_dict`, which may also
  hold parameters that were not trained. Values that are not tensors are left
  out.

  Args:
    path: the file, for messages.
    loaded: the unpickled contents of the file.

  Raises:
    errors.UserError: if the contents are not a dictionary, hold no tensors, two
      tensors of one name or a key that is not text, or are nested too deeply;
      or if the EMA is not a single dictionary.
  """
  if isinstance(loaded, reading.Tensor) or not isinstance(loaded, Mapping):
    kind = "tensor" if isinstance(loaded, reading.Tensor) else type(loaded)
    name = kind if isinstance(kind, str) else kind.__name__
    raise errors.UserError(
      f"{path}: expected a dictionary of tensors, found {name}"
    )
  found = loaded
  for name in ("model_state_dict", "state_dict"):
    if isinstance(found.get(name), Mapping):
      found = found[name]
  if "ema_model_state_dict" in loaded:
    averages = loaded["ema_model_state_dict"]
    if not isinstance(averages, Mapping) or len(averages) != 1:
      raise errors.UserError(
        f"{path}: expected a single entry in ema_model_state_dict"
      )
    (averaged,) = averages.values()
    if not isinstance(averaged, Mapping):
      raise errors.UserError(
        f"{path}: the entry in ema_model_state_dict is no dictionary"
      )
    found = averaged if found is loaded else {**found, **averaged}
  named: dict[str, reading.Tensor] = {}
  for names, tensor in _tensors(path, found):
    name = ".".join(names)
    if name in named:
      raise errors.UserError(f"{path} holds {errors.brief(name)} twice")
    named[name] = tensor
  if not named:
    raise errors.UserError(f"{path} holds no tensors with names")
  return named


def _tensors(
  path: pathlib.Path, found: Mapping[Any, Any]
) -> Iterator[tuple[tuple[str, ...], reading.Tensor]]:
  """Yields tensors with their keys, without leading keys that all share."""
  listed = [*_walk(path, found)]
  shared = 0
  while (
    len({names[: shared + 1] for names, _ in listed}) == 1
    and min(len(names) for names, _ in listed) > shared + 1
  ):
    shared += 1
  for names, tensor in listed:
    yield names[shared:], tensor


def _walk(
  path: pathlib.Path, found: Mapping[Any, Any]
) -> Iterator[tuple[tuple[str, ...], reading.Tensor]]:
  pending: list[tuple[tuple[str, ...], Any]] = [((), found)]
  seen = 0
  while pending:
    names, value = pending.pop()
    if isinstance(value, reading.Tensor):
      yield names, value
      continue
    if isinstance(value, list | tuple):
      value = dict(enumerate(value))
    if not isinstance(value, Mapping):
      continue
    seen += len(value)
    if len(names) > _DEEPEST or seen > _MOST:
      raise errors.UserError(
        f"{path}: expected dictionaries of tensors, found them nested more than"
        f" {_DEEPEST} deep or more than {_MOST:,} entries"
      )
    for key, inner in reversed([*value.items()]):
      if isinstance(key, str | int | float):
        pending.append(((*names, str(key)), inner))
      elif isinstance(inner, reading.Tensor):
        raise errors.UserError(
          f"{path}: expected names of tensors, found a key that is no text"
          f" ({type(key).__name__})"
        )
