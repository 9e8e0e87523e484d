"""Reads tables of texts, such as prompts or captions, in several formats.

  .jsonl, .ndjson  an object per line
  .json            a list of objects, or an object per line
  .csv, .tsv       a header and rows; .csv may use commas, semicolons or tabs,
                   and the delimiter that gives the most known columns is taken
  .txt             a text per line, if the caller accepts such a table

Text is UTF-8, or UTF-16 with a byte order mark, as spreadsheets and Windows
editors write it. Only newlines end a line: U+2028 inside a text stays. Names of
columns are not case-sensitive. Null in JSON and an empty cell of a spreadsheet
are missing values; an empty text in JSON is an empty text.
"""

import codecs
import csv
import io
import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dcvideogen_jax import documents, errors

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
_TEXT = ".txt"
_MARKS = {
  codecs.BOM_UTF8: "utf-8-sig",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    where: the file and the line, as a prefix of error messages.
    values: the values by column; None for null or an empty cell.
  """

  where: str
  values: dict[str, Any]


def read(
  path: str | os.PathLike[str],
  columns: Iterable[str],
  required: Mapping[str, Sequence[str]],
  *,
  lists: Sequence[str] = (),
  line: str | None = None,
) -> list[Row]:
  """Reads a table.

  Args:
    path: the file, in any format above.
    columns: names of the known columns, in lower case. Other columns are kept
      with their names as written.
    required: for each thing that a table must have, named as in an error
      message, the columns of which at least one must be present.
    lists: columns whose cells are JSON in .csv and .tsv.
    line: the column for the lines of a .txt file and for the texts of a JSON
      list; None refuses both.

  Raises:
    errors.UserError: if the file cannot be read, is of another kind, has no
      rows, or lacks a column; if a line is damaged, has a column twice or is
      nested too deep, or a text holds half of a surrogate pair.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  # A path without a suffix may be a pipe, which holds a text per line.
  plain = line is not None and kind in (_TEXT, "")
  if not plain and kind not in (*_JSON, *_DELIMITERS):
    kinds = [*_JSON, *_DELIMITERS, *([] if line is None else [_TEXT])]
    raise errors.UserError(
      f"expected a table of the kind {', '.join(kinds)}, found {path.name}"
    )
  text = read_text(path)
  if plain:
    lines = enumerate(io.StringIO(text, newline=None), 1)
    placed = [(f"line {n}", {line: x.strip()}) for n, x in lines if x.strip()]
  elif kind in _JSON:
    placed = [*_json_rows(text, path, columns, line)]
  else:
    placed = [*_csv_rows(text, path, columns, _DELIMITERS[kind], lists)]
  if not placed:
    raise errors.UserError(f"{path} holds no rows")
  rows = [Row(f"{path}, {place}", values) for place, values in placed]
  names = {name: None for row in rows for name in row.values}
  for what, allowed in required.items():
    if not names.keys() & set(allowed):
      raise errors.UserError(
        f"{path} has no column with the {what}: expected one of "
        f"{', '.join(allowed)}, found {short([*names])}"
      )
  return rows


def read_text(path: pathlib.Path) -> str:
  """Reads the text of a file, without its byte order mark.

  Raises:
    errors.UserError: if the file cannot be read, or is not UTF-8 (or UTF-16
      with a byte order mark).
  """
  try:
    content = path.read_bytes()
  except (OSError, ValueError) as e:
    reason = getattr(e, "strerror", None) or e
    raise errors.UserError(f"cannot read {short(path)}: {reason}") from e
  encoding = next(
    (name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8"
  )
  try:
    text = content.decode(encoding)
  except UnicodeDecodeError as e:
    raise errors.UserError(f"{path} is not UTF-8 text: {e}") from e
  if "\0" in text:
    raise errors.UserError(
      f"{path} is not UTF-8 text: it holds NUL characters, as UTF-16 without a "
      "byte order mark does"
    )
  return text


def require_text(value: Any, what: str) -> str:
  """Returns the value if it is a text that UTF-8 can encode, without NUL.

  Raises:
    errors.UserError: if it is not; the message begins with `what`.
  """
  if not isinstance(value, str):
    raise errors.UserError(f"{what} is no text: {short(value)}")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise errors.UserError(
      f"{what} holds half of a surrogate pair, which is no character, at place "
      f"{e.start}: {short(value)}"
    ) from e
  if "\0" in value:
    raise errors.UserError(f"{what} holds a NUL character: {short(value)}")
  return value


def parse(text: str, where: str) -> Any:
  """Parses JSON whose objects have no key twice.

  Raises:
    errors.UserError: if the text is not such JSON; the message begins with
      `where`.
  """
  try:
    return documents.parse(text)
  except ValueError as e:
    raise errors.UserError(f"{where} is not JSON: {e}") from e


def short(value: Any) -> str:
  """Returns a value as it appears in a message: quoted, and cut if long."""
  return _SHORT.repr(str(value) if isinstance(value, os.PathLike) else value)


def _names(found: Iterable[str], columns, where: str) -> list[str]:
  """Returns names of columns, with the known ones in lower case.

  Raises:
    errors.UserError: if a known column appears twice.
  """
  names = [
    name.strip().lower() if name.strip().lower() in columns else name
    for name in found
  ]
  for name in columns:
    if names.count(name) > 1:
      raise errors.UserError(f"{where} has the column {name} twice")
  return names


def _json_rows(
  text, path, columns, line
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, row) for each object of a list, or of each line."""
  if text.lstrip().startswith("["):
    placed = [(f"row {n}", x) for n, x in enumerate(parse(text, str(path)), 1)]
  else:
    placed = [
      (place, parse(x, f"{path}, {place}"))
      for n, x in enumerate(text.split("\n"), 1)
      if x.strip() and (place := f"line {n}")
    ]
  for place, row in placed:
    if isinstance(row, str) and line is not None:
      row = {line: row}
    if not isinstance(row, dict):
      raise errors.UserError(
        f"{path}, {place}: expected an object, found {short(row)}"
      )
    names = _names(row, columns, f"{path}, {place}")
    yield place, dict(zip(names, row.values(), strict=True))


def _csv_rows(
  text, path, columns, delimiters, lists
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, row) for each row below the header."""

  def rows(delimiter):
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
      for cells in reader:
        if any(cell.strip() for cell in cells):
          yield f"line {reader.line_num}", [cell.strip() for cell in cells]
    except csv.Error as e:
      raise errors.UserError(f"{path}, line {reader.line_num}: {e}") from e

  def known(delimiter):
    try:
      _, header = next(rows(delimiter), (None, []))
    except errors.UserError:
      return 0
    return sum(name.lower() in columns for name in header)

  delimiter = max(delimiters, key=known)
  lines = rows(delimiter)
  place, header = next(lines, (None, []))
  if header and not known(delimiter):
    raise errors.UserError(
      f"{path}: expected a header with some of {', '.join(columns)}, found "
      f"{short(header)}"
    )
  header = _names(header, columns, f"{path}, {place}")
  for place, cells in lines:
    if len(cells) > len(header):
      raise errors.UserError(
        f"{path}, {place}: expected a cell for each of {short(header)}, found "
        f"{len(cells)}"
      )
    cells += [""] * (len(header) - len(cells))
    row: dict[str, Any] = {
      name: cell or None for name, cell in zip(header, cells, strict=True)
    }
    for name in lists:
      if row.get(name) is not None:
        row[name] = parse(row[name], f"{path}, {place}")
    yield place, row
