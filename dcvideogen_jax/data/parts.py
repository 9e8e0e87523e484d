"""Writes folders of encoded clips, part by part.

  DIR/settings.json                    the settings of the encoding; written
                                       first
  DIR/part-00000/480x832.array_record  the clips of one part and one bucket
  DIR/part-00000/part.json             how many clips the part has, the shapes
                                       of their arrays, and which clips were
                                       left out, with the reason
  DIR/negative.safetensors             the negative prompt's embedding, if there
                                       is a text encoder
  DIR/skipped.jsonl                    all clips that were left out
  DIR/index.json                       an index of all parts; written last

A part appears once it is complete. An interrupted folder can therefore be
continued, and processes can write parts in any order. The content of the folder
does not depend on the order, on the process or on the time.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcvideogen_jax import documents, errors, files
from dcvideogen_jax.data import descriptions, latents, records

SETTINGS, PART, SKIPPED = "settings.json", "part.json", "skipped.jsonl"


def name(number: int) -> str:
  """Returns the name of a part's directory."""
  return f"part-{number:05d}"


def begin(
  directory: str | os.PathLike[str], settings: Mapping[str, Any]
) -> pathlib.Path:
  """Creates the folder, or continues one that has the same settings.

  Raises:
    errors.UserError: if the folder has other settings, holds other files, or is
      in an object store, where processes cannot lock their parts.
  """
  if files.is_remote(directory):
    raise errors.UserError(
      "expected a directory of this machine, where parts can be locked, found"
      f" {files.path(directory)}"
    )
  directory = files.make_directory(directory)
  path = directory / SETTINGS
  if not path.exists():
    full = any(p.name[0] != "." for p in directory.iterdir())
    # Another process may have written the settings in the meantime.
    if full and not path.exists():
      raise errors.UserError(
        f"{directory} is not empty and has no {SETTINGS} to continue from"
      )
    if not full:
      with files.atomic(path) as temporary:
        temporary.write_text(_json(settings), encoding="utf-8")
      return directory
  try:
    old = documents.parse(path.read_bytes())
    differ = [
      f"{key} was {old.get(key)!r} and is {settings.get(key)!r}"
      for key in sorted(old.keys() | settings.keys())
      if old.get(key) != json.loads(json.dumps(settings.get(key)))
    ]
  except (OSError, ValueError, AttributeError) as e:
    raise errors.UserError(f"cannot read {path}: {e}") from e
  if differ:
    raise errors.UserError(
      f"{directory} was begun with other settings: {'; '.join(differ)}"
    )
  return directory


def is_done(directory: pathlib.Path, number: int) -> bool:
  """Returns whether a part is written."""
  return (directory / name(number)).is_dir()


def locked(
  directory: pathlib.Path, number: int
) -> contextlib.AbstractContextManager[bool]:
  """Returns a context that locks a part, and yields whether it got the lock.

  It yields False while another process writes the part; see `files.lock`.
  """
  return files.lock(directory / f".{name(number)}.lock")


class Writer:
  """Writes one part, as a context manager; an exception discards the part."""

  def __init__(
    self, directory: pathlib.Path, number: int, facts: Mapping[str, Any]
  ):
    """Sets which part is written.

    Args:
      directory: the folder, as `begin` returns it.
      number: number of the part.
      facts: facts for the readers of the folder, the same in all parts.
    """
    self._path = directory / name(number)
    self._stack = contextlib.ExitStack()
    self._writers: dict[str, Any] = {}
    self._about: dict[str, Any] = {
      "facts": dict(facts),
      "buckets": {},
      "skipped": [],
    }

  def __enter__(self) -> "Writer":
    self._temporary = self._stack.enter_context(
      files.atomic_directory(self._path, keep_other=True)
    )
    return self

  def write(
    self, bucket: str, arrays: Mapping[str, Any], meta: Mapping[str, Any]
  ) -> None:
    """Appends a clip to its bucket.

    Args:
      bucket: name of the bucket, such as "480x832".
      arrays: as for `latents.encode`.
      meta: as for `latents.encode`.

    Raises:
      ValueError: if the arrays have other shapes than earlier clips of the
        bucket.
      errors.UserError: if the clip cannot be written.
    """
    shapes = {
      key: None if key == "text" else [*value.shape]
      for key, value in sorted(arrays.items())
    }
    held = self._about["buckets"].setdefault(
      bucket, {"records": 0, "shapes": shapes}
    )
    if held["shapes"] != shapes:
      raise ValueError(f"{bucket} has {held['shapes']}, found {shapes}")
    with records.writing(self._path):
      if bucket not in self._writers:
        path = self._temporary / f"{bucket}{records.SUFFIX}"
        self._writers[bucket] = records.new_writer(path)
      self._writers[bucket].write(latents.encode(arrays, meta))
    held["records"] += 1

  def skip(self, file: str, reason: str) -> None:
    """Records that a clip is left out, and why."""
    self._about["skipped"].append({"file": file, "reason": reason})

  def __exit__(self, kind, value, traceback) -> bool | None:
    if kind is not None:
      with contextlib.suppress(errors.UserError):
        self._close()
      return self._stack.__exit__(kind, value, traceback)
    with self._stack:
      self._close()
      text = _json(self._about)
      (self._temporary / PART).write_text(text, encoding="utf-8")
    return None

  def _close(self) -> None:
    with records.writing(self._path):
      for writer in self._writers.values():
        writer.close()


def write_negative(directory: pathlib.Path, text: np.ndarray) -> None:
  """Writes the negative prompt's embedding (s, e), for `latents.negative`."""
  with files.atomic(directory / latents.NEGATIVE) as path:
    path.write_bytes(latents.encode({"text": [text]}, {}))


def finish(directory: pathlib.Path, count: int) -> dict[str, Any] | None:
  """Writes the index if all `count` parts are written.

  Returns:
    The index as `latents.read_index` returns it, or None if parts are missing.

  Raises:
    errors.UserError: if a part cannot be read, or the parts differ in their
      facts or in the shapes of a bucket.
  """
  numbers = range(count)
  if not all(is_done(directory, number) for number in numbers):
    return None
  buckets: dict[str, Any] = {}
  facts: dict[str, Any] = {}
  table, skipped = {}, []
  for number in numbers:
    about = read(directory / name(number) / PART, descriptions.PART)
    if (facts := facts or about["facts"]) != about["facts"]:
      raise errors.UserError(
        f"{directory / name(number)}: expected {facts}, found {about['facts']}"
      )
    skipped += about["skipped"]
    held = about["buckets"]
    table[name(number)] = {b: held[b]["records"] for b in sorted(held)}
    for bucket, found in held.items():
      known = buckets.setdefault(bucket, {**found, "records": 0})
      if known["shapes"] != found["shapes"]:
        raise errors.UserError(
          f"{directory / name(number)}: {bucket} has {found['shapes']}, "
          f"expected {known['shapes']}"
        )
      known["records"] += found["records"]
  index = {
    "format": latents.FORMAT,
    "records": sum(about["records"] for about in buckets.values()),
    "settings": read(directory / SETTINGS, descriptions.SETTINGS),
    "facts": facts,
    "buckets": dict(sorted(buckets.items())),
    "parts": table,
  }
  with files.atomic(directory / SKIPPED) as path:
    lines = (json.dumps(x, ensure_ascii=False) + "\n" for x in skipped)
    path.write_text("".join(lines), encoding="utf-8")
  with files.atomic(directory / latents.INDEX) as path:
    path.write_text(_json(index), encoding="utf-8")
  return index


def read(path: pathlib.Path, fields: descriptions.Fields) -> dict[str, Any]:
  """Reads a JSON file of the folder and checks its fields.

  Raises:
    errors.UserError: if the file is missing, damaged or lacks a field.
  """
  try:
    document = documents.parse(path.read_bytes())
    descriptions.require(document, fields)
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{path} is missing or damaged: {e}") from e
  return document


def _json(value: Any) -> str:
  return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
