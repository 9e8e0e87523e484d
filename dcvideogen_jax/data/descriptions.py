"""Checks the fields of the JSON files in a folder of encoded clips."""

from collections.abc import Callable, Mapping
from typing import Any

# For each field, a test of its value.
Fields = Mapping[str, Callable[[Any], bool]]


def _are_counts(value: Any) -> bool:
  """Returns whether a value is a list of whole numbers of 0 or more."""
  return isinstance(value, list) and all(map(_is_count, value))


def _is_count(value: Any) -> bool:
  return type(value) is int and value >= 0


def _is_object(value: Any) -> bool:
  return isinstance(value, dict)


def _objects_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
  """Returns a test that a value is an object whose values all pass `fits`."""
  return lambda found: _is_object(found) and all(map(fits, found.values()))


def _is_bucket(value: Any) -> bool:
  """Returns whether a value is {"records", "shapes"}.

  The shape of "text" is null, because texts differ in length.
  """
  shapes = _objects_of(lambda shape: shape is None or _are_counts(shape))
  return (
    _is_object(value)
    and _is_count(value.get("records"))
    and shapes(value.get("shapes"))
  )


def _are_objects(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_object, value))


INDEX: Fields = {
  "records": _is_count,
  "settings": _is_object,
  "facts": _is_object,
  "buckets": _objects_of(_is_bucket),
  "parts": _objects_of(_objects_of(_is_count)),
}
PART: Fields = {
  "facts": _is_object,
  "buckets": _objects_of(_is_bucket),
  "skipped": _are_objects,
}
SETTINGS: Fields = {}


def require(document: Any, fields: Fields) -> None:
  """Checks that a document has the given fields, with valid values.

  Raises:
    ValueError: if the document is not an object, lacks a field, or a field has
      a value that its test refuses.
  """
  if not _is_object(document):
    raise ValueError(f"expected an object, found {str(document)[:80]}")
  if missing := sorted(fields.keys() - document.keys()):
    raise ValueError(f"it lacks {', '.join(missing)}")
  for name, fits in fields.items():
    if not fits(document[name]):
      found = str(document[name])[:80]
      raise ValueError(f"its {name} cannot be {found}")
