"""Damages files, in ways that a random generator chooses.

Bytes are damaged whatever a file holds (see `bytewise`). Programs and people
write fields that make no sense into files that are well formed otherwise: JSON,
tables (see `fields`), headers and the pickles of PyTorch (see `headers`) are
taken apart, changed in one place, and put together again.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from tests.damage import bytewise, fields, headers
from tests.damage.bytewise import Random

# How a field of a file is changed, by the file's form; None has only bytes.
FORMS: dict[str, Callable[[bytes, Random], tuple[bytes, str]] | None] = {
  "bytes": None,
  "json": fields.in_json,
  "lines": fields.in_lines,
  "table": fields.in_table,
  "text": fields.in_text,
  "safetensors": headers.in_safetensors,
  "torch": headers.in_torch,
}
# How often a field is changed where there are fields.
_FIELDS = 0.6


class Damage(NamedTuple):
  """What was done to a file.

  Attributes:
    description: for people.
    field: whether a field was changed, in a file that is well formed; False if
      its bytes were.
  """

  description: str
  field: bool


def damage(path: pathlib.Path, form: str, random: Random) -> Damage:
  """Damages a file in place, so that it is not what it was.

  Args:
    path: the file.
    form: a key of `FORMS`.
    random: decides what is done, and where.
  """
  content = changed = path.read_bytes()
  while changed == content:
    in_fields = FORMS[form] is not None and random.random() < _FIELDS
    change = FORMS[form] if in_fields else bytewise.change
    changed, description = change(content, random)
  path.write_bytes(changed)
  return Damage(description, in_fields)
