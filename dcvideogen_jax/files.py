"""Writing files so that nothing half-written is ever left behind.

What begins with gs:// is in an object store. There an object appears as a whole
once its writing ends, which is as good as a rename; nothing can be appended;
and a directory is but a part of names, so none is made.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TypeAlias

from etils import epath

from dcvideogen_jax import errors

Path: TypeAlias = pathlib.Path | epath.Path
_STORE = "gs://"


def path(where: str | os.PathLike[str]) -> Path:
  """A path of this machine, or of an object store.

  Raises:
    errors.UserError: for another scheme than gs://.
  """
  text = os.fspath(where)
  if is_remote(text):
    return epath.Path(text)
  if "://" in text:
    raise errors.UserError(
      f"expected a path of this machine or one that begins with {_STORE},"
      f" found {text}"
    )
  return pathlib.Path(text)


def is_remote(where: str | os.PathLike[str]) -> bool:
  """Whether a path is of an object store."""
  return os.fspath(where).startswith(_STORE)


def make_directory(where: str | os.PathLike[str]) -> Path:
  """Creates the directory and its parents.

  In an object store it is only looked at, so that a name or rights that are
  wrong are told at once.

  Raises:
    errors.UserError: if a parent is a file, or it cannot be written to or
      looked at.
  """
  directory = path(where)
  if is_remote(directory):
    _look_at(directory)
    return directory
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f"cannot create the output directory {directory}: {e.strerror or e}"
    ) from e
  return directory


def _look_at(directory: Path) -> None:
  try:
    next(directory.iterdir(), None)
  except FileNotFoundError:  # Nothing is there yet.
    return
  except ImportError as e:
    raise errors.UserError(
      f"{_STORE} needs gcsfs, which requirements-tpu.txt installs: {e}"
    ) from e
  # gcsfs, google.auth and aiohttp each raise types of their own.
  except Exception as e:
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    raise errors.UserError(f"cannot use {directory}: {reason}") from e


@contextlib.contextmanager
def atomic(where: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary path and puts the file in its place on success.

  The temporary name keeps the suffix, so writers that choose a format by
  suffix work. On any failure the temporary file is removed and `where` is left
  as it was.

  Raises:
    errors.UserError: if the file cannot be created, written or renamed. What
      fails in an object store is no fault of the input, and raised as it is.
  """
  target = path(where)
  if isinstance(target, pathlib.Path):
    with _renamed(target) as temporary:
      yield temporary
    return
  with tempfile.TemporaryDirectory() as directory:
    temporary = pathlib.Path(directory) / target.name
    yield temporary
    epath.Path(temporary).copy(target, overwrite=True)


def upload(source: str | os.PathLike[str], target: Path) -> None:
  """Copies the files of a directory of this machine, and all below it."""
  for found in sorted(pathlib.Path(source).rglob("*")):
    if found.is_file():
      name = found.relative_to(source).as_posix()
      epath.Path(found).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _renamed(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """`atomic` where files can be renamed: the temporary one lies beside it."""
  temporary = None
  try:
    handle, name = tempfile.mkstemp(
      prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = pathlib.Path(name)
    yield temporary
    # After writing: some writers replace the file by a private one.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, target)
  except OSError as e:
    raise errors.UserError(f"cannot write {target}: {e.strerror or e}") from e
  finally:
    if temporary is not None:
      temporary.unlink(missing_ok=True)
