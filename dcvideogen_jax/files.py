"""Writing files so that nothing half-written is ever left behind.

What is written lies under a hidden name, `.new-...`, beside its place, and gets
its own name once it is complete and on the disk: whatever happens, the place
holds the old or the new. While it is written a lock (flock) is held on it. A
killed process loses its locks, and the next one that writes into the same
directory removes what it left.

What begins with gs:// is in an object store. There an object appears as a whole
once its writing ends, which is as good as a rename; nothing can be appended,
locked or left half-written; and a directory is but a part of names, so none is
made.
"""

import contextlib
import errno
import logging
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import TypeAlias

from etils import epath

from dcvideogen_jax import errors, leftovers

Path: TypeAlias = pathlib.Path | epath.Path
CACHE_VARIABLE = "DCVIDEOGEN_CACHE"

_STORE = "gs://"
# The reasons for which a disk takes no more, which no file can be blamed for.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path(where: str | os.PathLike[str]) -> Path:
  """A path of this machine, or of an object store.

  Raises:
    errors.UserError: for another scheme than gs://.
  """
  text = os.fspath(where)
  if is_remote(text):
    return epath.Path(_STORE + text.removeprefix("gs:").lstrip("/"))
  if "://" in text:
    raise errors.UserError(
      f"expected a path of this machine or one that begins with {_STORE},"
      f" found {text}"
    )
  return pathlib.Path(text)


def is_remote(where: str | os.PathLike[str]) -> bool:
  """Whether a path is of an object store."""
  # Of the two slashes pathlib keeps one.
  return os.fspath(where).startswith("gs:/")


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
def atomic(
  where: str | os.PathLike[str], mode: int = 0o666
) -> Iterator[pathlib.Path]:
  """Yields a temporary path and puts the file in its place on success.

  The temporary name keeps the suffix, so writers that choose a format by
  suffix work. On any failure the temporary file is removed and `where` is left
  as it was.

  Args:
    where: the file to write.
    mode: its permissions, of which the process's umask takes some away.

  Raises:
    errors.UserError: if the file cannot be created, written or renamed. An
      OSError of the body that is about another file is raised as it is, and so
      is what fails in an object store, which is no fault of the input.
  """
  target = path(where)
  if isinstance(target, pathlib.Path):
    with _temporary(target, lambda new: _create(new, mode)) as temporary:
      yield temporary
      with writing(target):
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    return
  with tempfile.TemporaryDirectory() as directory:
    temporary = pathlib.Path(directory) / target.name
    yield temporary
    epath.Path(temporary).copy(target, overwrite=True)


@contextlib.contextmanager
def atomic_directory(
  where: str | os.PathLike[str], keep_other: bool = False
) -> Iterator[pathlib.Path]:
  """Yields a temporary directory and gives it its name on success.

  On any failure it is removed with all that is in it.

  Args:
    where: a directory of this machine that is not there, or is empty.
    keep_other: whether one that appears there meanwhile is as good; it is left
      as it is.

  Raises:
    errors.UserError: as `atomic`; also if something else lies there.
  """
  target = pathlib.Path(where)
  with _temporary(target, _create_directory) as temporary:
    yield temporary
    with writing(target):
      for below in temporary.rglob("*"):
        _flush(below)
      _flush(temporary)
      try:
        os.rename(temporary, target)
      except OSError:
        if not (keep_other and target.is_dir()):
          raise
      _flush(target.parent)


@contextlib.contextmanager
def atomic_files(
  directory: str | os.PathLike[str], last: str = ""
) -> Iterator[pathlib.Path]:
  """Yields a temporary directory whose files move to `directory` on success.

  Each replaces what had its name. On any failure they are removed.

  Args:
    directory: of this machine; must exist.
    last: suffix of the files that move when the others have moved, and so tell
      that all are there.

  Raises:
    errors.UserError: as `atomic`.
  """
  directory = pathlib.Path(directory)
  with _temporary(directory / "files", _create_directory) as temporary:
    yield temporary
    with writing(directory):
      made = sorted(
        temporary.iterdir(), key=lambda x: (x.suffix == last, x.name)
      )
      for found in made:
        _flush(found)
      for found in made:
        os.replace(found, directory / found.name)
      _flush(directory)


@contextlib.contextmanager
def lock(where: str | os.PathLike[str]) -> Iterator[bool]:
  """Yields whether this caller alone holds a lock, which it does not wait for.

  The lock is an empty file, which is there while the lock is held. A process
  that is killed gives its locks up. Where the file system knows no locks,
  everybody gets them, which a warning says.

  Args:
    where: a file of this machine; its directory must exist.

  Raises:
    errors.UserError: if the file cannot be created.
  """
  target = pathlib.Path(where)
  while True:
    with writing(target):
      handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      locked = leftovers.try_lock(handle)
      if locked is False:
        yield False
        return
      if locked is None:
        logging.warning(
          "%s cannot be locked, as its file system knows no locks: other"
          " processes may be at the same work",
          target,
        )
      if not leftovers.is_at(
        handle, target
      ):  # It was given up, and removed, just now.
        continue
      try:
        yield True
        return
      finally:
        target.unlink(missing_ok=True)
    finally:
      os.close(handle)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
  """Turns what the disk complains of into one sentence about `target`.

  Raises:
    errors.UserError: for any OSError of the body, which is to do nothing else
      than to write.
  """
  try:
    yield
  except OSError as e:
    raise errors.UserError(f"cannot write {target}: {e.strerror or e}") from e


def cache_directory() -> pathlib.Path:
  """Where this user keeps what can be fetched or made again.

  $DCVIDEOGEN_CACHE, else dcvideogen_jax in the user's cache directory.
  """
  if chosen := os.environ.get(CACHE_VARIABLE):
    return pathlib.Path(chosen).expanduser()
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "dcvideogen_jax"


def is_full(error: OSError) -> bool:
  """Whether the disk is full, or a quota or limit of it is reached."""
  return error.errno in _FULL


def upload(source: str | os.PathLike[str], target: Path) -> None:
  """Copies the files of a directory of this machine, and all below it."""
  for found in sorted(pathlib.Path(source).rglob("*")):
    if found.is_file():
      name = found.relative_to(source).as_posix()
      epath.Path(found).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _temporary(target: pathlib.Path, create) -> Iterator[pathlib.Path]:
  """Yields a locked temporary beside `target`; removes it if it is left.

  Args:
    target: what it is going to be.
    create: makes the path that it is given and returns an open handle.

  Raises:
    errors.UserError: if it cannot be made, or for an OSError of the body that
      is about it, or about a disk that takes no more.
  """
  with writing(target):
    leftovers.sweep(target.parent)
    while True:
      # Long names stay within the 255 bytes that file systems take.
      temporary = target.with_name(
        f"{leftovers.PREFIX}{leftovers.machine()}-{secrets.token_hex(4)}-{target.stem[:40]}"
        f"{target.suffix}"
      )
      # Another process may sweep it away before it is opened, or locked.
      try:
        handle = create(temporary)
      except FileNotFoundError:
        if target.parent.is_dir():
          continue
        raise
      if leftovers.try_lock(handle) is not False and leftovers.is_at(
        handle, temporary
      ):
        break
      os.close(handle)
  try:
    yield temporary
  except OSError as e:
    if not _is_about(e, temporary):
      raise
    raise errors.UserError(f"cannot write {target}: {e.strerror or e}") from e
  finally:
    leftovers.remove(temporary)
    os.close(handle)


def _create(where: pathlib.Path, mode: int) -> int:
  # The kernel applies the umask: to ask for it is to change it for all threads.
  return os.open(where, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def _create_directory(where: pathlib.Path) -> int:
  where.mkdir()
  return os.open(where, os.O_RDONLY)


def _is_about(error: OSError, temporary: pathlib.Path) -> bool:
  """Whether a temporary, or what is in it, could not be written."""
  if not isinstance(error.filename, str | bytes):  # Writes name no file.
    return is_full(error)
  return pathlib.Path(os.fsdecode(error.filename)).is_relative_to(temporary)


def _flush(where: pathlib.Path) -> None:
  """Waits until a file, or the names in a directory, are on the disk."""
  handle = os.open(where, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError:
    if not where.is_dir():  # Not every file system flushes directories.
      raise
  finally:
    os.close(handle)
