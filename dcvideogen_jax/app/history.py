"""The videos in a folder, newest first, by their reports."""

import json
import pathlib
from typing import Any, NamedTuple

# The page shows this many.
MOST = 60


class Made(NamedTuple):
  """A video that was made.

  Attributes:
    name: of its files, without suffix.
    prompt, seed: that it was made of.
    size: such as "16 x 64 x 64".
    steps: of the solver.
    seconds: that it took in all.
    command: that makes it again; "" if it was made without the page.
  """

  name: str
  prompt: str
  seed: str
  size: str
  steps: str
  seconds: str
  command: str


def made(directory: pathlib.Path, most: int = MOST) -> list[Made]:
  """Returns the videos of a folder that have a report, the newest first."""
  if not directory.is_dir():
    return []
  found = [
    path
    for path in directory.glob("*.json")
    if not path.name.startswith(".") and path.with_suffix(".mp4").is_file()
  ]
  found.sort(key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
  rows = (_read(path) for path in found)
  return [row for row in rows if row is not None][:most]


def is_made(directory: pathlib.Path, name: str) -> bool:
  """Whether a name is that of a picture or video with a report."""
  path = pathlib.Path(name)
  return (
    path.name == name
    and not name.startswith(".")
    and path.suffix in (".mp4", ".png")
    and (directory / path.with_suffix(".json")).is_file()
  )


def _read(path: pathlib.Path) -> Made | None:
  """Returns None for a JSON file that is no report of a video."""
  try:
    report = json.loads(path.read_text(encoding="utf-8"))
    settings: dict[str, Any] = report["settings"]
    size = " x ".join(str(settings[k]) for k in ("frames", "height", "width"))
    return Made(
      path.stem,
      " ".join(settings["prompts"]),
      ", ".join(map(str, settings["seeds"] or [])),
      size,
      str(settings["steps"]),
      f"{report['seconds']['total']:.1f}",
      str(settings.get("command", "")),
    )
  except (OSError, ValueError, LookupError, TypeError):
    return None
