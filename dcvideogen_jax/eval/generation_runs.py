"""Measures generated videos, one after the other, and resumes.

FVD compares them with reference clips. Videos that start from an image are
compared with it, and all are followed in colour.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import UInt8

from dcvideogen_jax import documents, errors
from dcvideogen_jax.data import probing
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.eval import (
  clip_figures,
  fvd,
  image_to_video,
  lpips,
  measurements,
)

_LABEL = "videos"
_FEATURES = "features"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Video(NamedTuple):
  """A video to measure.

  Attributes:
    path: the file.
    prompt: the text that it was made for; None if unknown.
    image: file of the image that it starts from; None if there is none.
  """

  path: pathlib.Path
  prompt: str | None = None
  image: str | None = None

  @property
  def name(self) -> str:
    """Names the video in a report."""
    return str(self.path)


class Reference(NamedTuple):
  """The clips that FVD compares with.

  Attributes:
    names: one for each clip.
    read: returns a clip by its number, uint8 `t h w 3`.
  """

  names: Sequence[str]
  read: Callable[[int], np.ndarray]


def listed(
  folder: str | os.PathLike[str],
  images: str | os.PathLike[str] | None = None,
) -> list[Video]:
  """Returns the videos of a folder, with the settings that lie beside them.

  Settings are those of `dcvideogen sample`: NAME.json beside NAME.mp4, or
  settings/NAME.json beside a folder videos/.

  Args:
    folder: with the folders below it.
    images: folder with the image that a video starts from, under the name of
      the image in the settings, or of the video; None takes the paths in the
      settings.

  Raises:
    errors.UserError: if there is no such folder, or no video in it, settings
      are damaged, or an image is missing.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise errors.UserError(f"there is no folder {root}")
  found = [
    _with_settings(path, images)
    for path in sorted(root.rglob("*"))
    if path.suffix.lower() in probing.VIDEO_SUFFIXES
  ]
  if not found:
    raise errors.UserError(f"{root} has no videos")
  return found


def _with_settings(path: pathlib.Path, images) -> Video:
  places = (
    path.with_suffix(".json"),
    path.parent.parent / "settings" / f"{path.stem}.json",
  )
  settings: Mapping[str, Any] = {}
  for place in filter(pathlib.Path.is_file, places):
    try:
      read = documents.parse(place.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
      raise errors.UserError(f"cannot read {place}: {e}") from e
    given = read.get("settings") if isinstance(read, dict) else None
    settings = given if isinstance(given, dict) else {}
    break
  prompts = settings.get("prompts")
  prompt = prompts[0] if isinstance(prompts, list) and prompts else None
  image = settings.get("image")
  if images is not None:
    names = [f"{path.stem}{suffix}" for suffix in _SUFFIXES]
    names[:0] = [pathlib.Path(image).name] if isinstance(image, str) else []
    choices = [pathlib.Path(images) / name for name in names]
    there = [x for x in choices if x.is_file()]
    if not there:
      raise errors.UserError(f"{images} has no image {names[0]} of {path}")
    image = str(there[0])
  if isinstance(image, str) and not os.path.isfile(image):
    raise errors.UserError(
      f"the image {image} that {path} starts from is gone: give its folder as"
      " --images"
    )
  return Video(path, prompt, image if isinstance(image, str) else None)


def measure(
  videos: Sequence[Video],
  record: measurements.Record,
  networks: clip_figures.Networks,
  window: int | None,
  image: Callable[[str, int, int], UInt8[np.ndarray, "h w 3"]],
  read: Callable[[Video, np.ndarray], Mapping[str, Any]] | None = None,
) -> None:
  """Measures the videos that are not in the record yet.

  Args:
    videos: the videos.
    record: gets a row for each.
    networks: of the metrics that need one.
    window: frames of the windows of FVD; None for whole videos.
    image: returns an image file in the height and width of the video, as the
      model got it.
    read: returns facts of a video, ready for JSON, that its prompt asks for;
      None reads none.

  Raises:
    errors.UserError: if a video cannot be read, or is too small or too short
      for a network.
  """
  net = networks.lpips

  def distance(a, b):
    return lpips.distance(net.module, net.variables, a, b)

  left = record.left(_LABEL, [video.name for video in videos])
  for i in tqdm.tqdm(left, desc="videos", unit="video", disable=None):
    video = videos[i]
    frames = np.stack([*video_files.read_frames(video.path)])
    row: dict[str, Any] = {"model": _LABEL, "clip": video.name}
    row["shape"] = [*frames.shape]
    start = None
    if video.image is not None:
      start = image(video.image, *frames.shape[1:3])
      found = image_to_video.first_frame(
        start, frames, None if net is None else distance
      )
      row["first_frame"] = {
        key: x if math.isfinite(x) else None for key, x in found.items()
      }
    row["drift"] = image_to_video.drift(frames, start).tolist()
    if networks.i3d is not None:
      row[_FEATURES] = _features(frames, window, networks.i3d)
    if read is not None:
      row["facts"] = read(video, frames)
    record.add(row)


def measure_reference(
  reference: Reference,
  record: measurements.Record,
  network: clip_figures.Loaded,
  window: int | None,
) -> None:
  """Adds the features of the reference clips that are not in the record yet.

  Args:
    reference: the clips.
    record: gets a row for each.
    network: I3D.
    window: as for `measure`.

  Raises:
    errors.UserError: if a clip cannot be read or is too short.
  """
  left = record.left(None, reference.names)
  for i in tqdm.tqdm(left, desc="reference", unit="clip", disable=None):
    found = _features(reference.read(i), window, network)
    name = reference.names[i]
    record.add({"model": None, "clip": name, _FEATURES: found})


def has_all(
  videos: Sequence[Video],
  reference: Reference | None,
  record: measurements.Record,
) -> bool:
  """Whether the record has all videos and reference clips."""
  names = [] if reference is None else reference.names
  return record.has_all(None, names) and record.has_all(
    _LABEL, [video.name for video in videos]
  )


def moments(
  names: Sequence[str] | None,
  videos: Sequence[Video],
  record: measurements.Record,
) -> fvd.Moments:
  """Returns the moments of the features in the record.

  Args:
    names: of the reference clips; None for those of the videos.
    videos: the videos.
    record: has all of them.
  """
  keys: list[tuple[str | None, str]] = [(_LABEL, x.name) for x in videos]
  if names is not None:
    keys = [(None, name) for name in names]
  texts = [text for key in keys for text in record.rows[key][_FEATURES]]
  return fvd.Moments.of(clip_figures.to_features(texts))


def summary(
  videos: Sequence[Video],
  record: measurements.Record,
  reference: fvd.Moments | fvd.Reference | None = None,
) -> dict[str, Any]:
  """Returns the figures of the videos, ready for JSON.

  Args:
    videos: all of which are in the record.
    record: the rows.
    reference: statistics that FVD compares with; None for no FVD.

  Returns:
    "videos"; "drift" by the frame's number, at the last frame and the largest;
    "first_frame", if some start from an image; "fvd" with both N; "facts",
    shares of the videos, if they were read. Means come with a spread, the
    standard deviation over the videos, and "n".
  """
  rows = [record.rows[_LABEL, video.name] for video in videos]
  drifts = [row["drift"] for row in rows]
  found: dict[str, Any] = {"videos": len(rows)}
  if reference is not None:
    made = moments(None, videos, record)
    found["fvd"] = None
    if made.count > 1:
      found["fvd"] = fvd.distance(made, reference)
    found["fvd_n"], found["fvd_reference_n"] = made.count, reference.count
  started = [row["first_frame"] for row in rows if "first_frame" in row]
  if started:
    found["first_frame"] = {
      key: _spread([row[key] for row in started]) for key in started[0]
    }
  longest = max(map(len, drifts))
  found["drift"] = {
    "last": _spread([x[-1] for x in drifts]),
    "largest": _spread([max(x) for x in drifts]),
    "by_frame": [
      float(np.mean([x[t] for x in drifts if t < len(x)]))
      for t in range(longest)
    ],
  }
  if all("facts" in row for row in rows):
    found["facts"] = {
      fact: float(np.mean([row["facts"]["right"][fact] for row in rows]))
      for fact in rows[0]["facts"]["right"]
    }
  found["by_video"] = [
    {
      "video": video.name,
      "prompt": video.prompt,
      "image": video.image,
      **{k: row[k] for k in ("shape", "first_frame", "facts") if k in row},
      "drift": row["drift"],
    }
    for video, row in zip(videos, rows, strict=True)
  ]
  return found


def _features(frames, window, network) -> list[str]:
  return [
    clip_figures.feature_text(part, network)
    for part in fvd.windows(frames, window)
  ]


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
  """Returns mean and standard deviation; values that are None are counted."""
  known = [x for x in values if x is not None]
  return {
    "mean": float(np.mean(known)) if known else None,
    "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    "n": len(known),
    "exact": len(values) - len(known),
  }


_NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


def markdown(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
  """Returns a table of a `summary`, below a line on the videos.

  Args:
    about: what the line says.
    found: the summary.
  """
  told = ", ".join(f"{key} {value}" for key, value in about.items())
  rows = [f"{told}.\n", "| metric | mean | spread over videos | N |"]
  rows.append("|---|---|---|---|")

  def add(name: str, value: Mapping[str, Any]) -> None:
    mean, std = (
      "-" if value[key] is None else f"{value[key]:.4f}"
      for key in ("mean", "std")
    )
    exact = f", {value['exact']} exact" if value["exact"] else ""
    rows.append(f"| {name} | {mean} | {std} | {value['n']}{exact} |")

  if "fvd" in found:
    value = "-" if found["fvd"] is None else f"{found['fvd']:.2f}"
    other = found["fvd_reference_n"]
    other = "an unknown number" if other is None else other
    rows.append(f"| FVD | {value} | - | {found['fvd_n']} against {other} |")
  for key, value in found.get("first_frame", {}).items():
    add(f"first frame, {_NAMES[key]}", value)
  add("colour drift at the last frame, Delta E", found["drift"]["last"])
  add("largest colour drift, Delta E", found["drift"]["largest"])
  for fact, share in found.get("facts", {}).items():
    name = "all three" if fact == "all" else fact
    rows.append(f"| {name} right | {share:.4f} | - | {found['videos']} |")
  return "\n".join(rows) + "\n"
