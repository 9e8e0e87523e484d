"""Tables of texts, read alike whatever they hold: prompts or captions.

  .jsonl, .ndjson  an object per line
  .json            a list of objects, or an object per line
  .csv, .tsv       a header and rows; commas, semicolons or tabs, whichever
                   show columns that are known
  .txt             a text per line, where a table may be that simple

Text is UTF-8, or UTF-16 with a byte order mark, as spreadsheets and Windows
editors write it. Lines end at newlines alone: U+2028 inside a text stays. Names
of columns are known in any case. Null and the empty cell of a spreadsheet are
nothing; an empty text in JSON is a text.
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
    where: the file and the line, to begin a complaint with.
    values: by column; what was null or an empty cell is None.
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
    path: the file, of any kind above.
    columns: names that are known, in lower case; others are kept as they are.
    required: what a table must have, by what it is called in a complaint: one
      of these columns.
    lists: columns whose cells are JSON in .csv and .tsv.
    line: the column that the lines of a .txt file, or the texts of a list, are;
      None takes no such files.

  Raises:
    errors.UserError: if the file cannot be read, is of another kind, has no
      rows, or lacks a column; if a line is damaged, has a column twice or is
      nested too deep, or a text holds half of a surrogate pair.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  # What has no suffix may be a pipe.
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
  """The text of a file, without its byte order mark.

  Raises:
    errors.UserError: if it cannot be read, or is not UTF-8 (or UTF-16 with a
      byte order mark).
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
  """The value, if it is a text that UTF-8 can hold, without NUL characters.

  Raises:
    errors.UserError: otherwise; the message begins with `what`.
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
  """JSON, whose objects have every key once.

  Raises:
    errors.UserError: if it is none; the message begins with `where`.
  """
  try:
    return documents.parse(text)
  except ValueError as e:
    raise errors.UserError(f"{where} is not JSON: {e}") from e


def short(value: Any) -> str:
  """A value for a message: quoted, and cut where it is long."""
  return _SHORT.repr(str(value) if isinstance(value, os.PathLike) else value)


def _names(found: Iterable[str], columns, where: str) -> list[str]:
  """Names of columns, those that are known in lower case and once each."""
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
  """(place, row) of a list's objects, or of every line's."""
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
  """(place, row) of every row below the header."""

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
