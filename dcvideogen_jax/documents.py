"""JSON as it comes from other people's files."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
  """What JSON holds; a name twice in one object is refused, not overwritten.

  Raises:
    ValueError: if it is not JSON, not UTF-8, or nested too deep, in one line.
  """
  try:
    return json.loads(text, object_pairs_hook=_once)
  except RecursionError:
    raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(n for n, _ in pairs if n in seen or seen.add(n))
    raise ValueError(f"it has {twice[:80]!r} twice")
  return found
