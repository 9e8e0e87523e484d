"""Lists the videos of a folder with their captions.

Captions come from a table that `tables` reads, or from a .txt file beside each
video, which holds one caption. The rows of a table have these columns:

  file      path of the video, relative to the folder of videos or to the
            table's folder, with or without its suffix; the column may also be
            called "video", "file_name" or another name in `FILE`
  caption   one caption; also "text" or "prompt"; or "captions", a list of texts
  score     how well the caption fits, or "scores", a list with one score for
            each caption; either all rows of a video have scores or none

In .csv and .tsv a list is written as JSON. A video may have several rows, whose
captions are combined.
"""

import os
import pathlib
import posixpath
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.data import probing, tables

# Columns that may hold the file, in the order in which they take precedence.
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
_MOST = 1e300  # Largest score.


class Captioned(NamedTuple):
  """The name of a clip with its captions.

  Attributes:
    file: path of the video relative to its folder, with "/"; another unique
      name if the clip does not come from a file.
    captions: any number of captions; no caption is empty.
    scores: a score of 0 or more for each caption, or None without scores.
  """

  file: str
  captions: tuple[str, ...] = ()
  scores: tuple[float, ...] | None = None


def read(
  folder: str | os.PathLike[str], table: str | os.PathLike[str] | None = None
) -> list[Captioned]:
  """Returns all videos of a folder and of the table, sorted by name.

  A video without a row in the table has no captions. A video that the table
  names is included even if its file is missing.

  Args:
    folder: the folder of videos; searched with its subfolders, except hidden
      ones.
    table: a table of a kind that `tables.read` knows; None reads the .txt files
      beside the videos.

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
  """Checks captions and scores that a user has given.

  Args:
    file: name of the clip.
    captions: a text, a list of texts or None; empty texts are dropped.
    scores: a number, a list with a number for each caption, or None.
    where: prefix of an error message.

  Raises:
    errors.UserError: if the captions are not texts, or the scores are not
      numbers of 0 or more, one for each caption.
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
  """Returns videos with the captions in the .txt files beside them."""
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
  """Finds a folder's videos by the names that a table may give them."""

  def __init__(self, folder, table, names: Iterable[str]):
    self._folder = os.path.abspath(folder)
    self._roots = (self._folder, os.path.dirname(os.path.abspath(table)))
    self._names = {*names}
    self._stems: dict[str, list[str]] = {}
    for name in names:
      self._stems.setdefault(posixpath.splitext(name)[0], []).append(name)

  def find(self, file: str) -> str:
    """Returns a video's name in the folder, or `file` if it is not there."""
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
  """Reads the captions of a table, by file."""
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
  """Returns the value of the first column with one; notes other values."""
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
  """Combines the captions of two rows of a file; drops duplicates."""
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
