"""Checks a folder of videos against a list of prompts of VBench's."""

import collections
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import tqdm

from dcvideogen_jax import errors
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import vbench, vbench_resume

_SHOWN = 3  # names in a sentence
# What is wrong with a folder, in the order of the report, and what it means.
PROBLEMS = {
  "missing": "are not there",
  "extra": "are none of the list's, and VBench may take the suffix of one of "
  "them for that of all videos",
  "unreadable": "cannot be read",
  "wrong_size": "have another size or frame rate than expected",
  "mixed": "were made with other settings than most",
}


class Size(NamedTuple):
  """Frames, pixels and frames per second of a video."""

  frames: int
  height: int
  width: int
  fps: float

  def __str__(self) -> str:
    return f"{self.frames} x {self.height} x {self.width}, {self.fps:g} fps"


def check(
  folder: str | os.PathLike[str],
  listed: vbench.Listed,
  size: tuple[int, int, int] | None = None,
  every_frame: bool = False,
) -> dict[str, Any]:
  """Compares a folder with a list.

  Args:
    folder: of the videos, or the folder above it that `dcvideogen sample`
      wrote. Settings are read if they are there.
    listed: the list.
    size: frames, height and width of all videos; None takes those in their
      settings, or of most videos where there are none.
    every_frame: decodes all frames instead of the first one of each video.

  Returns:
    A report, ready for JSON: "complete"; for each of `PROBLEMS` the names, with
    reasons; "dimensions", the videos that are there and due for each; "size",
    which most videos have; "made_with", the settings that most share, or None.

  Raises:
    errors.UserError: if there is no such folder, or settings are damaged.
  """
  top = pathlib.Path(folder)
  place = top / vbench.VIDEOS if (top / vbench.VIDEOS).is_dir() else top
  if not place.is_dir():
    raise errors.UserError(f"there is no folder {place}")
  due = {name: p for p in listed.prompts for name in p.names()}
  present = {entry.name for entry in os.scandir(place)}
  there = [name for name in due if name in present]
  stored = _settings(place.parent, there)
  sizes, unreadable = _sizes(place, there, every_frame)
  wanted = {
    name: Size(*size, found.fps)
    if size
    else _stored_size(stored.get(name), found)
    for name, found in sizes.items()
  }
  usual = _most(sizes.values())
  report = {
    "folder": str(place),
    "list": str(listed.path),
    "videos": len(due),
    "there": len(there),
    "size": None if usual is None else str(usual),
    "made_with": _most_settings(stored.values()),
    "missing": [name for name in due if name not in present],
    "extra": sorted(present - due.keys()),
    "unreadable": unreadable,
    "wrong_size": {
      name: f"{found}, expected {wanted[name] or usual}"
      for name, found in sizes.items()
      if found != (wanted[name] or usual) or (not size and found != usual)
    },
  }
  report["mixed"] = {
    name: settings["vbench"].get("made_with")
    for name, settings in stored.items()
    if settings["vbench"].get("made_with") != report["made_with"]
  }
  report["dimensions"] = _dimensions(listed, {*sizes})
  report["complete"] = not any(report[name] for name in PROBLEMS)
  return report


def told(report: Mapping[str, Any]) -> list[str]:
  """Returns the lines that say what a report of `check` found."""
  lines = [
    f"{report['folder']}: {report['there']} of {report['videos']} videos, "
    f"{report['size']}"
  ]
  for name, what in PROBLEMS.items():
    found = report[name]
    if not found:
      continue
    shown = [*found][:_SHOWN]
    if isinstance(found, dict) and name != "mixed":
      shown = [f"{key} ({found[key]})" for key in shown]
    more = ", ..." if len(found) > _SHOWN else ""
    lines.append(f"{len(found)} {what}: {', '.join(shown)}{more}")
  for name, numbers in report["dimensions"].items():
    lines.append(f"  {name}: {numbers['there']} of {numbers['due']}")
  return lines


def _settings(
  folder: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """Returns the settings of the videos that have some."""
  if not (folder / vbench.SETTINGS).is_dir():
    return {}
  found = {
    name: vbench_resume.stored(folder, name.removesuffix(".mp4"))
    for name in names
  }
  return {name: x for name, x in found.items() if x is not None}


def _sizes(
  place: pathlib.Path, names: list[str], every_frame: bool
) -> tuple[dict[str, Size], dict[str, str]]:
  """Returns the sizes of videos, and why the others cannot be read."""
  sizes, unreadable = {}, {}
  for name in tqdm.tqdm(names, unit="video", disable=None, leave=False):
    try:
      info = video_files.probe(place / name)
      if every_frame:
        decoded = sum(1 for _ in video_files.frames(place / name))
        if decoded != info.frames:
          raise errors.UserError(
            f"{decoded} frames can be decoded, expected {info.frames}"
          )
    except errors.UserError as e:
      unreadable[name] = str(e)
      continue
    sizes[name] = Size(info.frames, info.height, info.width, round(info.fps, 3))
  return sizes, unreadable


def _stored_size(
  settings: Mapping[str, Any] | None, found: Size
) -> Size | None:
  if settings is None:
    return None
  values = (settings.get(x) for x in ("frames", "height", "width", "fps"))
  return Size(
    *(y if x is None else x for x, y in zip(values, found, strict=True))
  )


def _most(values: Iterable[Any]) -> Any | None:
  common = collections.Counter(values).most_common(1)
  return common[0][0] if common else None


def _most_settings(stored: Iterable[Mapping[str, Any]]) -> Any | None:
  """Returns the settings that most videos share; None if none has any."""
  made = [settings["vbench"].get("made_with") for settings in stored]
  index = _most(made.index(x) for x in made)
  return None if index is None else made[index]


def _dimensions(
  listed: vbench.Listed, readable: set[str]
) -> dict[str, dict[str, int]]:
  """Counts the videos of each dimension that are due and can be read."""
  numbers: dict[str, dict[str, int]] = {}
  for prompt in listed.prompts:
    names = prompt.names()
    for dimension in prompt.dimensions:
      row = numbers.setdefault(dimension, {"due": 0, "there": 0})
      row["due"] += len(names)
      row["there"] += len(readable.intersection(names))
  return numbers
