"""The record of a measurement, which a stopped run reads and goes on with.

Each measured clip is a line of a file beside the report. Several processes that
share the clips write a file each, and read those of the others.
"""

import glob
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors


class Share(NamedTuple):
  """Which of the clips a process measures.

  Attributes:
    process: number of the process, from 0.
    processes: number of processes that share the clips.
  """

  process: int = 0
  processes: int = 1


ALL = Share()


class Record:
  """Rows of measured clips, in files of JSON lines.

  Attributes:
    rows: by model and clip; those of original or reference clips have no model.
  """

  def __init__(
    self, path: pathlib.Path, settings: Mapping[str, Any], share: Share = ALL
  ):
    """Reads what earlier runs of the same settings left.

    Args:
      path: the file, which ends in .jsonl; need not exist. Each of several
        processes writes a file of its own beside it.
      settings: what determines the results, ready for JSON.
      share: of this process.

    Raises:
      errors.UserError: if a file is of other settings.
    """
    self._path, self._share = path, share
    self._own = path
    if share.processes > 1:
      part = f".{share.process}-of-{share.processes}"
      self._own = path.with_suffix(part + path.suffix)
    self._head = json.dumps({"settings": settings}, sort_keys=True) + "\n"
    self.rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    text = self._head + "".join(self._lines(self._own))
    self.look()
    self._own.write_text(text, encoding="utf-8")

  def look(self) -> None:
    """Reads the rows that other processes have written by now.

    Raises:
      errors.UserError: if a file is of other settings.
    """
    for path in self._files():
      for line in self._lines(path):
        row = json.loads(line)
        self.rows[row["model"], row["clip"]] = row

  def add(self, row: dict[str, Any]) -> None:
    """Appends a row with "model" and "clip"."""
    with self._own.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
    self.rows[row["model"], row["clip"]] = row

  def left(self, model: str | None, clips: Iterable[str]) -> list[int]:
    """Returns the numbers of the clips of this process that have no row.

    Args:
      model: of the rows.
      clips: names of all clips.
    """
    mine = [*enumerate(clips)][self._share.process :: self._share.processes]
    return [i for i, name in mine if (model, name) not in self.rows]

  def has_all(self, model: str | None, clips: Iterable[str]) -> bool:
    """Whether all clips have a row of the model, whoever measured them."""
    return all((model, name) in self.rows for name in clips)

  def remove(self) -> None:
    """Removes the files of all processes, once their rows are in the report."""
    for path in self._files():
      path.unlink(missing_ok=True)

  def _files(self) -> list[pathlib.Path]:
    folder = glob.escape(str(self._path.with_suffix("")))
    return [
      pathlib.Path(path)
      for path in sorted(glob.glob(f"{folder}*{self._path.suffix}"))
      if pathlib.Path(path) == self._path or "-of-" in path
    ]

  def _lines(self, path: pathlib.Path) -> list[str]:
    """Returns the complete lines of a file, but for its head."""
    try:
      text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
      return []
    # The last line has no end if the run was killed while it wrote.
    complete = text[: text.rfind("\n") + 1]
    first, *rest = complete.splitlines(keepends=True) or [self._head]
    if first != self._head:
      raise errors.UserError(
        f"{path} is of a run with other settings: expected to go on with the "
        "same ones; remove it to start anew"
      )
    return rest
