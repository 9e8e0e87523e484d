"""Which videos a folder holds, and what is said of each.

Captions come from a table, JSON lines or CSV, whose rows have

  file      relative to the folder; also "video", "file_name" or "path"
  caption   one text; also "text"; or "captions", a list of texts
  score     how well it fits, or "scores", a list; all rows of a file or none

(in CSV a list is written as JSON), where rows of the same file add up; or,
without a table, each from the .txt beside its video, as one text.
"""

import csv
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.data import pipeline

_FILE = ("file", "video", "file_name", "path")
_ONE = ("caption", "text")


class Captioned(NamedTuple):
  """A clip's name and what is said of it.

  Attributes:
    file: as found in the folder, with "/"; some other name if it is no file.
    captions: none, one or several, not empty.
    scores: one for each, 0 or more; None if nobody gave any.
  """

  file: str
  captions: tuple[str, ...] = ()
  scores: tuple[float, ...] | None = None


def read(
  folder: str | os.PathLike[str], table: str | os.PathLike[str] | None = None
) -> list[Captioned]:
  """All videos of a folder, and those that the table names, by name.

  A video that nothing is said of has no captions; one that is not there is
  among the result all the same.

  Args:
    folder: looked through with the folders in it; hidden ones are left out.
    table: .jsonl or .csv; None reads the .txt files beside the videos.

  Raises:
    errors.UserError: if the folder is missing or has no videos, or the table
      cannot be read; the message names the line.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.UserError(f"{folder} is not a folder of videos")
  names = [_relative(path, folder) for path in folder.rglob("*")]
  names = [
    name
    for name in names
    if name.lower().endswith(pipeline.VIDEO_SUFFIXES)
    and not any(part.startswith(".") for part in name.split("/"))
  ]
  if not names:
    raise errors.UserError(
      f"{folder} has no {', '.join(pipeline.VIDEO_SUFFIXES)} files"
    )
  if table is None:
    return [_beside(folder, name) for name in sorted(names)]
  said = _gather(pathlib.Path(table), folder)
  everything = sorted({*names, *said})
  return [said.get(name, Captioned(name)) for name in everything]


def checked(
  file: str, captions: Any, scores: Any = None, where: str = ""
) -> Captioned:
  """Captions and scores of unknown origin.

  Raises:
    errors.UserError: if they are no lists of texts and of numbers, or do not
      fit each other; the message starts with `where`.
  """
  captions = [captions] if isinstance(captions, str) else captions or []
  if not _is_list_of(captions, str):
    raise errors.UserError(f"{where}captions must be texts, found {captions!r}")
  number = isinstance(scores, int | float) and not isinstance(scores, bool)
  scores = [scores] if number else scores
  texts = [text.strip() for text in captions]
  if scores is None:
    return Captioned(file, tuple(text for text in texts if text))
  if (
    not _is_list_of(scores, int | float)
    or len(scores) != len(texts)
    or not all(math.isfinite(score) and score >= 0 for score in scores)
  ):
    raise errors.UserError(
      f"{where}expected {len(texts)} scores of 0 or more, one for each "
      f"caption, found {scores!r}"
    )
  pairs = [
    (text, float(score))
    for text, score in zip(texts, scores, strict=True)
    if text
  ]
  if not pairs:
    return Captioned(file)
  return Captioned(file, *zip(*pairs, strict=True))


def _is_list_of(values, kind) -> bool:
  return isinstance(values, list | tuple) and all(
    isinstance(value, kind) and not isinstance(value, bool) for value in values
  )


def _relative(path: pathlib.Path, folder: pathlib.Path) -> str:
  """The name that a video has in its folder, if it is in there."""
  if path.is_relative_to(folder):
    path = path.relative_to(folder)
  return path.as_posix()


def _beside(folder: pathlib.Path, name: str) -> Captioned:
  path = (folder / name).with_suffix(".txt")
  try:
    text = path.read_text(encoding="utf-8").strip()
  except FileNotFoundError:
    return Captioned(name)
  except (OSError, UnicodeDecodeError) as e:
    raise errors.UserError(f"cannot read the caption {path}: {e}") from e
  return Captioned(name, (text,) if text else ())


def _gather(table: pathlib.Path, folder: pathlib.Path) -> dict[str, Captioned]:
  """What a table says, by file."""
  said: dict[str, Captioned] = {}
  for where, row in _rows(table):
    file = next((row[key] for key in _FILE if row.get(key)), None)
    if not isinstance(file, str):
      raise errors.UserError(
        f"{where}expected a file under one of {', '.join(_FILE)}, found "
        f"{sorted(map(str, row))}"
      )
    single = next((row[key] for key in _ONE if row.get(key)), None)
    several = row.get("captions")
    if single is not None and several:
      raise errors.UserError(f"{where}has both one caption and captions")
    scores = row.get("score") if row.get("scores") is None else row["scores"]
    name = _relative(pathlib.PurePath(file), folder)
    new = checked(name, several or single, scores, where)
    old = said.get(name)
    if old is None or not old.captions:
      said[name] = new
    elif new.captions:
      if (old.scores is None) != (new.scores is None):
        raise errors.UserError(
          f"{where}some captions of {name} have scores and some have none"
        )
      both = None if old.scores is None else old.scores + new.scores
      said[name] = Captioned(name, old.captions + new.captions, both)
  return said


def _rows(table: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """(what to begin a complaint with, row) for every line."""
  readers = {".jsonl": _json_rows, ".csv": _csv_rows}
  if table.suffix.lower() not in readers:
    raise errors.UserError(
      f"captions are a .jsonl or .csv file, found {table.name}"
    )
  try:
    with open(table, encoding="utf-8-sig", newline="") as file:
      for number, row in readers[table.suffix.lower()](file, table):
        yield f"{table}, line {number}: ", row
  except (OSError, UnicodeDecodeError, csv.Error) as e:
    raise errors.UserError(f"cannot read {table}: {e}") from e


def _json_rows(file, table):
  for number, line in enumerate(file, 1):
    if not line.strip():
      continue
    row = _parsed(line, f"{table}, line {number}")
    if not isinstance(row, dict):
      raise errors.UserError(
        f"{table}, line {number}: expected an object, found {line.strip()!r}"
      )
    yield number, row


def _csv_rows(file, table):
  reader = csv.DictReader(file)
  for row in reader:
    where = f"{table}, line {reader.line_num}"
    for key in ("captions", "score", "scores"):
      row[key] = _parsed(row[key], where) if row.get(key) else None
    yield reader.line_num, row


def _parsed(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    raise errors.UserError(f"{where} is not JSON: {e}") from e
