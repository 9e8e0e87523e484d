"""What is stored of the videos for VBench, and which of them are left to make.

A folder holds videos of one run. A video that is there counts as made only if
its stored settings are those of the run that continues.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables
from dcvideogen_jax.sample import vbench

# Where the settings of a video for VBench hold what `told` returns.
KEY = "vbench"


def told(video: vbench.Video, made_with: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is stored of a video beside its settings, ready for JSON.

  Args:
    video: the video.
    made_with: what all videos of the folder have in common.
  """
  image = video.image and pathlib.Path(video.image).name
  return {
    "prompt": video.original,
    "sample": video.sample,
    "row": video.row,
    "given": video.prompt,
    "image": image,
    "seed": video.seed,
    "made_with": dict(made_with),
  }


def stored(
  folder: pathlib.Path, name: str, key: str = KEY
) -> dict[str, Any] | None:
  """Returns the stored settings of a video; None if there are none.

  Args:
    folder: with the folders of videos and settings.
    name: of the video, without suffix.
    key: where the settings hold what `told` returned.

  Raises:
    errors.UserError: if the file is damaged.
  """
  path = folder / vbench.SETTINGS / f"{name}.json"
  if not path.exists():
    return None
  settings = tables.parse(tables.read_text(path), str(path))
  settings = settings.get("settings") if isinstance(settings, dict) else None
  if not isinstance(settings, dict) or not isinstance(settings.get(key), dict):
    raise errors.UserError(f"{path} does not hold the settings of a video")
  return settings


def remaining(
  folder: pathlib.Path,
  wanted: Sequence[vbench.Video],
  made_with: Mapping[str, Any],
  key: str = KEY,
) -> list[vbench.Video]:
  """Returns the videos that are not there yet.

  Args:
    folder: with the folders of videos and settings; may be empty.
    wanted: the videos.
    made_with: of `told`.
    key: as for `stored`.

  Raises:
    errors.UserError: if a video is there with other settings, or without any.
  """
  left = []
  for video in wanted:
    name = video.name()
    if not (folder / vbench.VIDEOS / f"{name}.mp4").exists():
      left.append(video)
      continue
    found = stored(folder, name, key)
    if found is None:
      raise errors.UserError(
        f"{folder / vbench.VIDEOS / name}.mp4 has no settings in "
        f"{folder / vbench.SETTINGS}, so whether it belongs to this run is "
        "unknown: expected another --output"
      )
    # As JSON gives it back.
    mine = json.loads(json.dumps(told(video, made_with)))
    if difference := _difference(found[key], mine):
      raise errors.UserError(
        f"{folder / vbench.VIDEOS / name}.mp4 is there, made with {difference}:"
        " expected the same settings, or another --output"
      )
  return left


def _difference(found: Any, wanted: Any, name: str = "") -> str | None:
  """Returns the first value that differs, in words; None if all are equal."""
  if isinstance(found, dict) and isinstance(wanted, dict):
    for key in dict.fromkeys((*wanted, *found)):
      pair = found.get(key), wanted.get(key)
      if difference := _difference(*pair, name=key):
        return difference
    return None
  if found == wanted:
    return None
  return f"{name} {tables.short(found)}, now {tables.short(wanted)}"


def check_case(folder: pathlib.Path, wanted: Sequence[vbench.Video]) -> None:
  """Refuses a folder where names that differ only in case are one file.

  Args:
    folder: exists.
    wanted: the videos.

  Raises:
    errors.UserError: names two such prompts.
  """
  first: dict[str, str] = {}
  for text in dict.fromkeys(video.original for video in wanted):
    other = first.setdefault(text.casefold(), text)
    if other != text and _ignores_case(folder):
      raise errors.UserError(
        f"{folder} is on a file system that takes {tables.short(other)} and "
        f"{tables.short(text)} for one name: expected one that tells upper from"
        " lower case"
      )


def _ignores_case(folder: pathlib.Path) -> bool:
  with tempfile.NamedTemporaryFile(dir=folder, prefix=".case-") as file:
    path = pathlib.Path(file.name)
    return path.with_name(path.name.swapcase()).exists()
