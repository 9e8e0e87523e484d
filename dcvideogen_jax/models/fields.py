"""Builds models from their fields, which come from files and flags.

Whatever JSON can hold may arrive: true where a number is meant, NaN, text, or
sizes for which no machine has memory.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn

Module = TypeVar("Module", bound=nn.Module)

# More than any model has; parameters are counted before they are made, and
# layers one by one.
_MOST = 10**7
_MOST_LAYERS = 1000


def build(
  cls: type[Module],
  what: str,
  config: Mapping[str, Any],
  overrides: Mapping[str, Any],
) -> Module:
  """A module of its fields; their values are the model's own to check.

  Args:
    cls: the module's class; fields that are tuples may be given as lists.
    what: the model, for messages.
    config: values by the names of fields.
    overrides: values that go before those.

  Raises:
    ValueError: if a field is unknown or missing, or a list is none, or has
      another length than its field.
  """
  values = {**config, **overrides}
  known = {f.name: f for f in dataclasses.fields(cls)}
  del known["parent"], known["name"]
  if unknown := sorted(values.keys() - known.keys()):
    raise ValueError(
      f"unknown fields of {what}: {told(unknown, 200)}; known are"
      f" {sorted(known)}"
    )
  needed = {n for n, f in known.items() if f.default is dataclasses.MISSING}
  if missing := sorted(needed - values.keys()):
    raise ValueError(f"missing fields of {what}: {missing}")
  for name, value in values.items():
    kind = known[name].type
    if typing.get_origin(kind) is tuple:
      of = typing.get_args(kind)
      values[name] = sequence(name, value, None if ... in of else len(of))
  return cls(**values)


def count(name: str, value: Any, least: int = 1, most: int = _MOST) -> None:
  """Raises ValueError unless a value is a whole number from `least` to `most`.

  Args:
    name: of the field, for the message.
    value: what was found.
    least: smallest value.
    most: largest value.
  """
  whole = isinstance(value, int) and not isinstance(value, bool)
  if not whole or value < least:
    what = {0: "0 or more", 1: "a positive whole number"}
    expected = what.get(least, f"a whole number of {least} or more")
    raise ValueError(f"{name} is {told(value)}, expected {expected}")
  if value > most:
    raise ValueError(f"{name} is {told(value)}, expected at most {most:,}")


def layers(name: str, value: Any) -> None:
  """`count` for what is built, or looked up, one by one."""
  count(name, value, most=_MOST_LAYERS)


def positive(name: str, value: Any) -> None:
  """Raises ValueError unless a value is a finite number above 0."""
  if not (_is_number(value) and value > 0):
    raise ValueError(
      f"{name} is {told(value)}, expected a finite number above 0"
    )


def finite(name: str, value: Any) -> None:
  """Raises ValueError unless a value is a finite number."""
  if not _is_number(value):
    raise ValueError(f"{name} is {told(value)}, expected a finite number")


def sequence(name: str, value: Any, length: int | None = None) -> tuple:
  """The values of a list or a tuple.

  Raises:
    ValueError: if the value is none, or has another length.
  """
  if not isinstance(value, list | tuple):
    raise ValueError(f"{name} is {told(value)}, expected a list")
  if length is not None and len(value) != length:
    raise ValueError(
      f"{name} has {len(value)} values, expected {length}: {told(value)}"
    )
  return tuple(value)


def told(value: Any, most: int = 60) -> str:
  """A value as a message shows it, cut where it is long."""
  if isinstance(value, int) and value.bit_length() > 4 * most:
    return f"a number of {value.bit_length()} bits"
  text = repr(value)
  return text if len(text) <= most else f"{text[:most]}..."


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # An integer that no float holds.
    return False
