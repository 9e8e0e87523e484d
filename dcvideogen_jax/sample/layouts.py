"""Finds the parts of a published model, and fetches them.

The known layouts are the directories and repositories of DC-VideoGen
(`dc-ai/DC-Gen-Wan2.1-T2V-14B` and `-I2V-14B`, published first together as
`nvidia/DC-VideoGen-Wan2.1-14B`), of Wan 2.1 in diffusers' form and of Wan 2.1
itself. A part that a directory's `parts.json` names (see `sample.parts_file`)
takes precedence over a part in the directory itself.
"""

import fnmatch
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from dcvideogen_jax import errors
from dcvideogen_jax.sample import hub, parts_file

TASKS = ("t2v", "i2v")

# Where a part may lie, in the order in which the places are tried. {task} is
# t2v or i2v. A `*` stands for any characters but "/".
_PLACES = {
  "transformer": (
    "transformer_{task}",
    "transformer",
    "diffusion_pytorch_model*.safetensors*",
    "wan2.1*{task}*.gguf",
  ),
  "dc_ae_v": ("dc-ae-v*.pt", "dc_ae_v", "autoencoder"),
  "wan_vae": ("vae", "Wan2.1_VAE*.pth"),
  "text_encoder": ("text_encoder", "models_t5_*.pth", "umt5*.gguf"),
  "tokenizer": ("tokenizer", "google/umt5-xxl"),
  "image_encoder": ("image_encoder", "models_clip_*.pth"),
  "scheduler": ("scheduler/scheduler_config.json",),
}
# Files of a transformer that lie in the directory itself, not in a folder.
_ROOT = "diffusion_pytorch_model*"

_CONFIG = "config.json"
_INDEX = ".safetensors.index.json"


class Paths(NamedTuple):
  """Where each part lies; None for a part that is missing or not needed.

  `text_tokens` is not a part: it is the number of text tokens that a
  directory's `parts.json` gives for its transformer, or None. `decoder` is one
  that replaces that of `dc_ae_v`.
  """

  transformer: pathlib.Path | None = None
  dc_ae_v: pathlib.Path | None = None
  wan_vae: pathlib.Path | None = None
  text_encoder: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  image_encoder: pathlib.Path | None = None
  scheduler: pathlib.Path | None = None
  text_tokens: int | None = None
  decoder: pathlib.Path | None = None


def locate(
  source: str | os.PathLike[str],
  task: str,
  *,
  autoencoder: str | os.PathLike[str] | None = None,
  image_encoder: str | os.PathLike[str] | None = None,
) -> Paths:
  """Finds all parts that a task needs, and fetches files that are not here.

  Args:
    source: a directory, or a Hugging Face repository (see `hub.is_repository`).
    task: "t2v" or "i2v".
    autoencoder: DC-AE-V, or Wan's autoencoder by its published names, if
      `source` has none or another one is wanted: its file or directory, or a
      directory or repository that holds it among other parts.
    image_encoder: CLIP, likewise. DC-VideoGen's image-to-video repository has
      none; for it, None means Wan's own.

  Returns:
    The paths, with one of the two autoencoders, and with CLIP for image to
    video only.

  Raises:
    errors.UserError: names all parts that are missing. Also if a part cannot be
      fetched, if several files could be the same part, if the repository is
      known to be for the other task, or for CLIP with text to video.
  """
  for other, repository in hub.REPOSITORIES.items():
    if other != task and hub.name(source) == repository:
      raise errors.UserError(
        f"{source} is for {other}, not {task}: expected"
        f" {hub.REPOSITORIES[task]} or {hub.OLDER}"
      )
  given = {}
  if autoencoder is not None:
    given |= _given(autoencoder, ("dc_ae_v", "wan_vae"), task)
  if image_encoder is not None:
    if task == "t2v":
      raise errors.UserError(
        f"text to video takes no image_encoder, found {image_encoder}"
      )
    given |= _given(image_encoder, ("image_encoder",), task)
  paths = find(source, task, given)._asdict() | given
  return Paths(**_needed(paths, task, source, given))


def find(
  source: str | os.PathLike[str], task: str, without: Collection[str] = ()
) -> Paths:
  """Looks for the parts of a model in a directory or repository.

  Only the files that the task needs are fetched from a repository, and only
  once all parts are found in its list of files. Weights that are published in
  several formats are fetched in one. A part that the official code takes from
  another repository is fetched from that one. If the network cannot be reached,
  files that were fetched before are used, with a warning. Without a revision
  the newest commit is used, which is part of the paths.

  Args:
    source: a published directory or repository, or a directory with a
      `parts.json`.
    task: "t2v" or "i2v".
    without: parts that come from elsewhere.

  Raises:
    errors.UserError: if there is no such directory, several files could be the
      same part, or parts.json is damaged or names what does not exist; if a
      repository lacks a part, or cannot be fetched and is not in the cache.
  """
  directory, companions = pathlib.Path(source), {}
  if hub.is_repository(source):
    repository = os.fspath(source)
    others = _companions(repository, task)
    directory = _download(repository, task, {*without, *others})
    for part in others.keys() - set(without):
      companions |= _given(others[part], (part,), task)
  if not os.path.isdir(directory):
    raise errors.UserError(f"there is no directory {directory}")
  parts = [x for x in _PLACES if x not in without and x not in companions]
  options = parts_file.read(directory, _PLACES).options
  return Paths(**_inside(directory, parts, task), **companions, **options)


def _download(
  repository: str, task: str, without: Collection[str]
) -> pathlib.Path:
  """Fetches the parts of a task; returns the snapshot's directory.

  The name of the directory is the commit.
  """

  def choose(names: list[str]) -> list[str]:
    entries = _entries(names)
    places = {
      part: _find(part, entries, task, repository)
      for part in _PLACES
      if part not in without
    }
    chosen = _needed(places, task, repository, without)
    wanted = {
      name
      for part, place in chosen.items()
      if place is not None
      for name in _files(names, part, place)
    }
    return sorted(wanted | ({parts_file.NAME} & set(names)))

  return hub.fetch(repository, choose)


def _companions(repository: str, task: str) -> dict[str, str]:
  """Returns the repositories of the parts that a repository lacks, by part.

  Only DC-VideoGen's image-to-video repository lacks one.
  """
  lacks = task == "i2v" and hub.name(repository) == hub.REPOSITORIES["i2v"]
  return {"image_encoder": hub.CLIP} if lacks else {}


def _given(
  source: str | os.PathLike[str], parts: tuple[str, ...], task: str
) -> dict[str, pathlib.Path]:
  """Finds a part that the user names: {which of `parts` it is: its path}."""
  path = pathlib.Path(source)
  if hub.is_repository(source):

    def choose(names: list[str]) -> list[str]:
      entries = _entries(names)
      for part in parts:
        if place := _find(part, entries, task, source):
          return _files(names, part, place)
      return _files(names, parts[0], ".")

    path = hub.fetch(os.fspath(source), choose)
  if path.is_dir():
    inside = _inside(path, parts, task)
    if held := [part for part in parts if inside[part] is not None]:
      return {held[0]: inside[held[0]]}
  for part in parts:
    if _find(part, {path.name}, task, source):
      return {part: path}
  return {parts[0]: path}


def _needed(
  paths: Mapping[str, Any],
  task: str,
  source: object,
  given: Collection[str],
) -> dict[str, Any]:
  """Selects the parts that a task needs from those that were found.

  Raises:
    errors.UserError: names all parts that are missing.
  """
  kinds = ("dc_ae_v", "wan_vae")
  autoencoders = [part for part in kinds if part in given] or [
    part for part in kinds if paths.get(part) is not None
  ]
  needed = ["transformer", "text_encoder", "tokenizer"]
  needed += autoencoders[:1] or kinds[:1]
  if task == "i2v":
    needed.append("image_encoder")
  missing = [p for p in needed if p not in given and paths.get(p) is None]
  if missing:
    lacking = "; ".join(_describe(part, task) for part in missing)
    raise errors.UserError(f"{source} lacks {lacking}")
  wanted = (*needed, "scheduler", *parts_file.OPTIONS)
  return {part: paths.get(part) for part in wanted}


def _describe(part: str, task: str) -> str:
  places = _PLACES[part]
  if part == "dc_ae_v":
    places += _PLACES["wan_vae"]
  names = ", ".join(place.format(task=task) for place in places)
  if part in ("dc_ae_v", "image_encoder"):
    option = "image_encoder" if part == "image_encoder" else "autoencoder"
    return f"{option} (none of {names}, and no {option} was given)"
  return f"{part} (none of {names})"


def _inside(
  directory: pathlib.Path, parts: Iterable[str], task: str
) -> dict[str, pathlib.Path | None]:
  """Returns where parts lie that a directory holds or its parts.json names."""
  named = parts_file.read(directory, _PLACES).paths
  # No part lies deeper than two levels.
  entries = {
    path.relative_to(directory).as_posix()
    for pattern in ("*", "*/*")
    for path in directory.glob(pattern)
  }
  paths: dict[str, pathlib.Path | None] = {}
  for part in parts:
    paths[part] = named.get(part)
    if paths[part] is None and (place := _find(part, entries, task, directory)):
      paths[part] = directory / place
  return paths


# --- listings: names relative to a directory or repository, with "/" ---------


def _entries(names: Iterable[str]) -> set[str]:
  """Returns the files and the directories that they are in."""
  entries = set(names)
  for name in names:
    entries |= {p.as_posix() for p in pathlib.PurePosixPath(name).parents}
  return entries - {"."}


def _find(
  part: str, entries: Collection[str], task: str, source: object
) -> str | None:
  """Returns a part's place, "." for the directory itself, or None."""
  for place in _PLACES[part]:
    pattern = place.format(task=task)
    fitting = sorted(name for name in entries if _fits(name, pattern))
    if fitting and place.startswith(_ROOT):
      return "."
    if len(fitting) > 1:
      raise errors.UserError(
        f"{source} holds several {part}: {', '.join(fitting)}"
      )
    if fitting:
      return fitting[0]
  return None


def _fits(name: str, pattern: str) -> bool:
  """Returns whether a name matches a pattern, whose `*` does not match "/"."""
  return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(
    name, pattern
  )


# --- Hugging Face ------------------------------------------------------------

# Marks the file name of a second copy of the weights, in another dtype or EMA.
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)[.-]")


def _files(names: Iterable[str], part: str, place: str) -> list[str]:
  """Returns the files of a part, with its weights in one format only."""
  folder = "" if place == "." else place
  inside = [name for name in names if os.path.dirname(name) == folder]
  config = os.path.join(folder if inside else os.path.dirname(place), _CONFIG)
  configs = [config] if config in names else []
  if not inside:
    return [place, *configs]
  if part == "tokenizer":
    return inside
  if place == "." and part == "transformer":
    inside = [name for name in inside if fnmatch.fnmatch(name, _ROOT)]
  return configs + _weights(inside)


def _weights(names: Iterable[str]) -> list[str]:
  """Selects the weights among the files of a directory, in one format only."""
  for suffixes in ((".safetensors", _INDEX), (".pt", ".pth", ".bin")):
    weights = [name for name in names if name.endswith(suffixes)]
    weights = [x for x in weights if not _VARIANT.search(x)] or weights
    # A single file beside an index repeats the weights of the index's shards.
    indices = (name for name in weights if name.endswith(_INDEX))
    whole = {name.removesuffix(".index.json") for name in indices}
    if weights := [name for name in weights if name not in whole]:
      return weights
  return []
