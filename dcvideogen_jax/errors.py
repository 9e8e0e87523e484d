"""The one exception that means "the user can fix this"."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Characters of a word in a message; longer than any path. Damaged files have
# names of thousands.
_WORD = 600


class UserError(ValueError):
  """A problem with the input, told in one sentence.

  The message says what was wrong, what was expected and what was found.
  Programs print it without a traceback and exit with code 2. Of very long words
  the middle is left out.
  """

  def __init__(self, message: str):
    """Takes the sentence."""
    super().__init__(re.sub(rf"\S{{{_WORD},}}", _shortened, message))


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
  """The value of a name in a table.

  Args:
    what: a config's key, say, for the message.
    name: what was found there.
    table: what may be there.

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
  """A name for a message: one of thousands of characters is cut."""
  if len(name) <= most:
    return name
  return f"{name[: most // 2]}...{name[-most // 4 :]} ({len(name)} characters)"
