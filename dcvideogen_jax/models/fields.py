"""Builds models from their fields, and checks the values.

Fields come from files and flags, so that any JSON may arrive: true where a
number is meant, NaN, text, or sizes for which no machine has memory.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn

from dcvideogen_jax.models import eight_bits

Module = TypeVar("Module", bound=nn.Module)

# Upper bounds, larger than in any model. They are checked before parameters are
# counted, which takes the layers one by one.
_MOST = 10**7
_MOST_LAYERS = 1000
_MOST_EPSILON = 0.1


def build(
  cls: type[Module],
  what: str,
  config: Mapping[str, Any],
  overrides: Mapping[str, Any],
) -> Module:
  """Builds a module from its fields, without checking their values.

  Args:
    cls: the module's class; a field of type tuple may be given as a list.
    what: name of the model, for error messages.
    config: values by the names of the fields.
    overrides: values that replace those of `config`.

  Raises:
    ValueError: if a field is unknown or missing, or the value of a field of
      type tuple is not a list of the right length.
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
  """Checks that a value is a whole number from `least` to `most`.

  Args:
    name: name of the field, for the error message.
    value: the field's value.
    least: smallest valid value.
    most: largest valid value.

  Raises:
    ValueError: if the value is not.
  """
  whole = isinstance(value, int) and not isinstance(value, bool)
  if not whole or value < least:
    what = {0: "0 or more", 1: "a positive whole number"}
    expected = what.get(least, f"a whole number of {least} or more")
    raise ValueError(f"{name} is {told(value)}, expected {expected}")
  if value > most:
    raise ValueError(f"{name} is {told(value)}, expected at most {most:,}")


def layers(name: str, value: Any) -> None:
  """Checks a number of layers or blocks, which are built one by one.

  Raises:
    ValueError: if the value is not a whole number from 1 to `_MOST_LAYERS`.
  """
  count(name, value, most=_MOST_LAYERS)


def positive(name: str, value: Any) -> None:
  """Checks that a value is a finite number above 0.

  Raises:
    ValueError: if the value is not.
  """
  if not (_is_number(value) and value > 0):
    raise ValueError(
      f"{name} is {told(value)}, expected a finite number above 0"
    )


def epsilon(name: str, value: Any) -> None:
  """Checks that a value is above 0 and small beside the variance of a norm.

  Raises:
    ValueError: if the value is not.
  """
  positive(name, value)
  if value > _MOST_EPSILON:
    raise ValueError(
      f"{name} is {told(value)}, expected a number up to {_MOST_EPSILON}"
    )


def finite(name: str, value: Any) -> None:
  """Checks that a value is a finite number.

  Raises:
    ValueError: if the value is not.
  """
  if not _is_number(value):
    raise ValueError(f"{name} is {told(value)}, expected a finite number")


def weights(value: Any) -> None:
  """Checks the format of a model's kernels.

  Raises:
    ValueError: unless `value` is None or a key of `eight_bits.FORMATS`.
  """
  if value not in (None, *eight_bits.FORMATS):
    raise ValueError(
      f"weights must be None or one of {', '.join(eight_bits.FORMATS)}, found"
      f" {told(value)}"
    )


def sequence(name: str, value: Any, length: int | None = None) -> tuple:
  """Returns a list or a tuple as a tuple.

  Args:
    name: name of the field, for the error message.
    value: the field's value.
    length: expected number of values; None for any.

  Raises:
    ValueError: if the value is not a list or tuple of that length.
  """
  if not isinstance(value, list | tuple):
    raise ValueError(f"{name} is {told(value)}, expected a list")
  if length is not None and len(value) != length:
    raise ValueError(
      f"{name} has {len(value)} values, expected {length}: {told(value)}"
    )
  return tuple(value)


def told(value: Any, most: int = 60) -> str:
  """Returns the text of a value for an error message; a long one is cut."""
  if isinstance(value, int) and value.bit_length() > 4 * most:
    return f"a number of {value.bit_length()} bits"
  text = repr(value)
  return text if len(text) <= most else f"{text[:most]}..."


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # The integer is too large for a float.
    return False
