"""What a directory says of its model in `parts.json`.

Where parts lie that are elsewhere, and for how many tokens of a text the
transformer was trained, where they are not Wan's 512:

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
# What is no path.
OPTIONS = ("text_tokens",)
# Of a text: far more than any model was trained for.
_MOST_TOKENS = 1 << 16


class PartsFile(NamedTuple):
  """The paths of parts by their names, and `OPTIONS`."""

  paths: Mapping[str, pathlib.Path]
  options: Mapping[str, Any]


def read(directory: pathlib.Path, parts: Collection[str]) -> PartsFile:
  """Reads the file, if there is one.

  Args:
    directory: that of the model.
    parts: names that may be used.

  Raises:
    errors.UserError: if it is damaged, names something unknown or what does not
      exist, or gives no number of tokens.
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
