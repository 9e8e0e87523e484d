"""Reads JSON from files of any origin, and recognises failed downloads."""

import json
from typing import Any

_WEB_PAGE = "is a web page, as failed downloads leave it"
_STAND_INS = {
  b"version https://git-lfs": (
    "is only the pointer that Git LFS leaves in place of a file: fetch the"
    " file itself, for instance with `git lfs pull`"
  ),
  b"<!doctype": _WEB_PAGE,
  b"<!DOCTYPE": _WEB_PAGE,
  b"<html": _WEB_PAGE,
}


def parse(text: str | bytes) -> Any:
  """Parses JSON; unlike `json.loads`, refuses an object with a name twice.

  Raises:
    ValueError: if the text is not JSON, not UTF-8, nested too deep, or has a
      name twice. The message is one line.
  """
  try:
    return json.loads(text, object_pairs_hook=_once)
  except RecursionError:
    raise ValueError("it is nested too deep") from None
  except UnicodeDecodeError as e:
    raise ValueError(str(e)) from None  # The error itself holds the whole text.


def stand_in(start: bytes) -> str | None:
  """Says what a failed download left in place of a file; None if nothing.

  Args:
    start: the first 32 bytes of the file.
  """
  for mark, what in _STAND_INS.items():
    if start.startswith(mark):
      return what
  return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(n for n, _ in pairs if n in seen or seen.add(n))
    raise ValueError(f"it has {twice[:80]!r} twice")
  return found
