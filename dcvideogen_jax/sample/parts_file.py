"""Reads `parts.json`, in which a directory describes its model.

The file gives the paths of parts that lie elsewhere. It also gives the number
of text tokens that the transformer was trained with, if it is not Wan's 512:

    {"dc_ae_v": "../dc_ae_v", "image_encoder": "/models/clip",
     "text_tokens": 32}

Keys are the fields of `layouts.Paths`; paths are relative to the directory.
"""

import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import documents, errors

NAME = "parts.json"
# Keys whose values are not paths.
OPTIONS = ("text_tokens",)
# Largest number of text tokens: far more than any model was trained with.
_MOST_TOKENS = 1 << 16


class PartsFile(NamedTuple):
  """The paths of parts by name, and the values of the `OPTIONS` given."""

  paths: Mapping[str, pathlib.Path]
  options: Mapping[str, Any]


def read(directory: pathlib.Path, parts: Collection[str]) -> PartsFile:
  """Reads the file of a directory; without one, nothing is given.

  Args:
    directory: that of the model.
    parts: names of parts that the file may use.

  Raises:
    errors.UserError: if the file is damaged, has an unknown key, names a path
      that does not exist, or gives a number of tokens out of range.
  """
  path = directory / NAME
  if not path.is_file():
    return PartsFile({}, {})
  try:
    table = documents.parse(path.read_bytes())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{path} is not readable as JSON: {e}") from e
  known = (*parts, *OPTIONS)
  if not isinstance(table, dict):
    raise errors.UserError(
      f"{path} is not an object of parts and their paths: found {table!r}"
    )
  if unknown := sorted(table.keys() - set(known)):
    raise errors.UserError(
      f"{path} has no meaning for {', '.join(unknown)}: expected "
      + ", ".join(known)
    )
  options = {name: table.pop(name) for name in OPTIONS if name in table}
  for part, place in table.items():
    if not isinstance(place, str):
      raise errors.UserError(f"{path}: {part} is no path: found {place!r}")
    if not os.path.exists(directory / place):
      raise errors.UserError(f"{path}: there is no {place[:200]} for {part}")
  for name, value in options.items():
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
      raise errors.UserError(
        f"{path}: {name} must be a whole number from 1 to {_MOST_TOKENS},"
        f" found {value!r}"
      )
  return PartsFile({part: directory / x for part, x in table.items()}, options)
