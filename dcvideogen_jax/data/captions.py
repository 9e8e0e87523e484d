"""Which videos a folder holds, and what is said of each.

Captions come from a table, as `tables` reads it, whose rows have

  file      relative to the folder or to the table's own, with or without its
            suffix; also "video", "file_name" and what else `FILE` has
  caption   one text; also "text" or "prompt"; or "captions", a list of texts
  score     how well it fits, or "scores", a list; all rows of a file or none

(in .csv and .tsv a list is written as JSON), where rows of the same file add
up; or, without a table, each from the .txt beside its video, as one text.
"""

import os
import pathlib
import posixpath
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.data import probing, tables

# Of several in a row, the first counts.
FILE = (
  "file",
  "video",
  "file_name",
  "path",
  "video_path",
  "file_path",
  "media_path",
  "filename",
)
_ONE = ("caption", "text", "prompt")
_SEVERAL, _SCORE, _SCORES = "captions", "score", "scores"
_MOST = 1e300  # of a score


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
    table: of a kind that `tables.read` knows; None reads the .txt files beside
      the videos.

  Raises:
    errors.UserError: if the folder is missing or has no videos, or the table
      cannot be read, has no captions or names none of the videos; the message
      names the line.
  """
  folder = pathlib.Path(folder)
  names = probing.video_names(folder)
  if table is None:
    return _beside(folder, names)
  said = _gather(pathlib.Path(table), _Names(folder, table, names))
  if not said.keys() & {*names} and not any(
    os.path.isfile(folder / name) for name in said
  ):
    raise errors.UserError(
      f"none of the files that {table} names is in {folder}, such as "
      f"{tables.short(next(iter(said)))}; there is {names[0]}"
    )
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
  captions = [captions] if isinstance(captions, str) else captions
  captions = [] if captions is None else captions
  if not _is_list_of(captions, str):
    raise errors.UserError(
      f"{where}captions must be texts, found {tables.short(captions)}"
    )
  for text in captions:
    tables.require_text(text, f"{where}the caption")
  number = isinstance(scores, int | float) and not isinstance(scores, bool)
  scores = [scores] if number else scores
  texts = [text.strip() for text in captions]
  if scores is None:
    return Captioned(file, tuple(text for text in texts if text))
  if (
    not _is_list_of(scores, int | float)
    or len(scores) != len(texts)
    or not all(0 <= score <= _MOST for score in scores)
  ):
    raise errors.UserError(
      f"{where}expected {len(texts)} scores of 0 or more, one for each "
      f"caption, found {tables.short(scores)}"
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


def _beside(folder: pathlib.Path, names: Iterable[str]) -> list[Captioned]:
  """Videos with the texts that lie beside them."""
  clips, unreadable = [], []
  for name in names:
    path = (folder / name).with_suffix(".txt")
    text = ""
    try:
      text = tables.read_text(path).strip() if path.exists() else ""
    except errors.UserError as e:
      unreadable.append(str(e))
    clips.append(Captioned(name, (text,) if text else ()))
  if unreadable:
    warnings.warn(
      f"{len(unreadable)} captions cannot be read and count as none, such as "
      f"{unreadable[0]}",
      stacklevel=4,
    )
  return clips


class _Names:
  """The names of videos by how a table may write them."""

  def __init__(self, folder, table, names: Iterable[str]):
    self._folder = os.path.abspath(folder)
    self._roots = (self._folder, os.path.dirname(os.path.abspath(table)))
    self._names = {*names}
    self._stems: dict[str, list[str]] = {}
    for name in names:
      self._stems.setdefault(posixpath.splitext(name)[0], []).append(name)

  def find(self, file: str) -> str:
    """The name in the folder; of a video that is not there, as written."""
    for written in (file, file.replace("\\", "/")):
      for root in self._roots:
        path = os.path.normpath(os.path.join(root, written))
        name = os.path.relpath(path, self._folder).replace(os.sep, "/")
        if name in self._names:
          return name
        if len(same := self._stems.get(name, ())) == 1:
          return same[0]
    return pathlib.PurePath(file).as_posix()


def _gather(table: pathlib.Path, names: _Names) -> dict[str, Captioned]:
  """What a table says, by file."""
  rows = tables.read(
    table,
    (*FILE, *_ONE, _SEVERAL, _SCORE, _SCORES),
    {"file": FILE, "caption": (*_ONE, _SEVERAL)},
    lists=(_SEVERAL, _SCORE, _SCORES),
  )
  said: dict[str, Captioned] = {}
  notes: dict[str, int] = {}
  for where, row in rows:
    where = f"{where}: "
    file = _first(row, FILE, notes)
    if not isinstance(file, str) or not file:
      raise errors.UserError(
        f"{where}expected a file under one of {', '.join(FILE)}, found "
        f"{tables.short(file) if file is not None else sorted(row)}"
      )
    name = names.find(tables.require_text(file, f"{where}the file"))
    single, several = _first(row, _ONE, notes), row.get(_SEVERAL)
    if single and several:
      raise errors.UserError(f"{where}has both one caption and captions")
    scores = row.get(_SCORES)
    scores = row.get(_SCORE) if scores is None else scores
    texts = single if several is None else several
    new = checked(name, texts, scores, where)
    said[name] = _joined(said.get(name), new, where, notes)
  for note, count in notes.items():
    warnings.warn(f"{table}: {count} rows {note}", stacklevel=4)
  return said


def _first(row: Mapping[str, Any], columns, notes: dict[str, int]) -> Any:
  """The first value that is given; that others differ from it is noted."""
  given = [name for name in columns if row.get(name) is not None]
  if not given:
    return None
  for other in given[1:]:
    if row[other] != row[given[0]]:
      note = f"have {given[0]}, which is used, and {other}, which is not"
      notes[note] = notes.get(note, 0) + 1
  return row[given[0]]


def _joined(
  old: Captioned | None, new: Captioned, where: str, notes: dict[str, int]
) -> Captioned:
  """What two rows say of a file; what both say counts once."""
  if old is None or not old.captions:
    return new
  if not new.captions:
    return old
  if (old.scores is None) != (new.scores is None):
    raise errors.UserError(
      f"{where}some captions of {new.file} have scores and some have none"
    )
  known = {*_pairs(old)}
  added = [pair for pair in _pairs(new) if pair not in known]
  if not added:
    note = "say what an earlier row says of the same file, and count once"
    notes[note] = notes.get(note, 0) + 1
    return old
  texts, scores = zip(*added, strict=True)
  return Captioned(
    new.file,
    old.captions + texts,
    None if old.scores is None else old.scores + scores,
  )


def _pairs(clip: Captioned) -> Iterable[tuple[str, float | None]]:
  return zip(
    clip.captions, clip.scores or [None] * len(clip.captions), strict=True
  )
