"""Finds the videos of a folder and probes them in parallel, with a cache."""

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import av
import tqdm

from dcvideogen_jax import errors, files
from dcvideogen_jax.data import containers, decoding, pixels, stills, video

VIDEO_SUFFIXES = (
  *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv"),
  *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".gif"),
)


def video_names(folder: str | os.PathLike[str]) -> list[str]:
  """Returns the videos of a folder and its subfolders, sorted.

  The names are paths relative to the folder, with "/". Links to folders are
  followed. Hidden files and folders are left out.

  Raises:
    errors.UserError: if the folder is missing or has no videos.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.UserError(f"{folder} is not a folder of videos")
  names = [
    path.relative_to(folder).as_posix()
    for path in _visible(folder)
    if path.suffix.lower() in VIDEO_SUFFIXES
  ]
  if not names:
    raise errors.UserError(f"{folder} has no {', '.join(VIDEO_SUFFIXES)} files")
  return sorted(names)


def _visible(
  folder: pathlib.Path, above: Sequence[str] = ()
) -> Iterator[pathlib.Path]:
  """Yields the files below a folder; skips links to a folder above."""
  real = os.path.realpath(folder)
  if real in above:
    return
  for path in folder.iterdir():
    if path.name.startswith("."):
      continue
    if path.is_dir():
      yield from _visible(path, (*above, real))
    else:
      yield path


def probe(
  folder: str | os.PathLike[str], names: Iterable[str]
) -> dict[str, video.VideoInfo | errors.UserError]:
  """Probes videos in parallel; returns the result or the error of each.

  Results are cached in `directory()` and stay valid while a file keeps its size
  and modification time. Errors are not cached.

  Args:
    folder: the folder that the names are relative to.
    names: names of the videos.
  """
  folder = pathlib.Path(folder)
  index = _index(folder)
  known = _read(index)
  new: dict[str, list] = {}

  def look(name: str) -> video.VideoInfo | errors.UserError:
    path = folder / name
    try:
      about = os.stat(path)
      stamp = [about.st_size, about.st_mtime_ns]
    except (OSError, ValueError):
      stamp = []
    row = known.get(name)
    if stamp and row is not None and row[0] == stamp:
      with contextlib.suppress(TypeError):
        return video.VideoInfo(**row[1])
    try:
      info = video.probe(path)
    except errors.UserError as e:
      return e
    # The comment tag can be long and is not needed here.
    new[name] = [stamp, dataclasses.asdict(info) | {"comment": None}]
    return info

  names = list(names)
  try:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      # Shows a progress bar on a terminal after 5 seconds.
      seen = tqdm.tqdm(
        pool.map(look, names),
        desc="looking at videos",
        total=len(names),
        delay=5,
        disable=None,
      )
      return dict(zip(names, seen, strict=True))
  finally:
    if new:
      # Without the cache only the next start takes longer.
      with contextlib.suppress(errors.UserError):
        _write(index, {**known, **new})


def directory() -> pathlib.Path:
  """Returns the directory of the cache, with a file for each video folder."""
  return files.cache_directory() / "videos"


def _index(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of a video folder's cache file."""
  place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
  return directory() / f"{place[:32]}.json"


@functools.cache
def _reader() -> str:
  """Returns a digest of PyAV's version and of the code that reads videos.

  Cached results of another digest are not used.
  """
  digest = hashlib.sha256(av.__version__.encode())
  for module in (video, containers, decoding, pixels, stills):
    source = pathlib.Path(str(module.__file__)).read_bytes()
    digest.update(_statements(source).encode())
  return digest.hexdigest()


def _statements(source: bytes) -> str:
  """Returns the syntax tree of Python code without docstrings, as text.

  Layout and comments are no part of a syntax tree, so prose can change without
  a change of `_reader`.
  """
  return ast.dump(_WithoutTexts().visit(ast.parse(source)))


class _WithoutTexts(ast.NodeTransformer):
  """Removes statements that are only a string, such as docstrings."""

  def visit_Expr(self, node):
    value = node.value
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
      return None
    return node


def _read(index: pathlib.Path) -> dict[str, list]:
  """Reads the cached rows by name.

  There are no rows if the file is missing, damaged or of another `_reader`.
  """
  try:
    content = json.loads(index.read_text(encoding="utf-8"))
    if content["reader"] != _reader():
      return {}
    return {
      name: [row[0], dict(row[1])] for name, row in content["rows"].items()
    }
  except (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RecursionError,
  ):
    return {}


def _write(index: pathlib.Path, rows: Mapping[str, list]) -> None:
  files.make_directory(index.parent)
  with files.atomic(index) as temporary:
    content = {"reader": _reader(), "rows": rows}
    temporary.write_text(json.dumps(content), encoding="utf-8")
