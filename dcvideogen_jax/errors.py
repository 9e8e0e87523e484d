"""`UserError`, the exception for problems that the user can fix."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Maximum characters of a word in a message, more than any path has. Names in
# damaged files can have thousands.
_WORD = 600


class UserError(ValueError):
  """A problem with the input, described in one sentence.

  The message says what was wrong, what was expected and what was found.
  Programs print it without a traceback and exit with code 2. The middle of very
  long words is left out.
  """

  def __init__(self, message: str):
    """Keeps the sentence, with very long words shortened."""
    super().__init__(re.sub(rf"\S{{{_WORD},}}", _shortened, message))


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
  """Looks up a name in a table.

  Args:
    what: describes the origin of the name, such as a config's key, for the
      message.
    name: the name to look up.
    table: the allowed names and their values.

  Raises:
    UserError: for a name that is not in the table.
  """
  if name not in table:
    raise UserError(f"{what} must be one of {', '.join(table)}, found {name!r}")
  return table[name]


def _shortened(word: re.Match[str]) -> str:
  text = word[0]
  return f"{text[: _WORD // 3]}...({len(text)} characters)...{text[-40:]}"


def brief(name: str, most: int = 120) -> str:
  """Shortens a name for a message if it is longer than `most` characters."""
  if len(name) <= most:
    return name
  return f"{name[: most // 2]}...{name[-most // 4 :]} ({len(name)} characters)"
