"""Writes files atomically, so that no half-written file is left behind.

A file is written under a hidden name, `.new-...`, beside its target, and gets
the target's name once it is complete and on the disk. So the target is always
the old file or the new one. While the file is written, the process holds a lock
(flock) on it. A killed process loses its locks, and the next process that
writes into the same directory removes its temporary files.

Paths that begin with gs:// are in an object store. An object appears as a whole
once its writing ends, which is as good as a rename. Objects cannot be appended
to, locked or left half-written. Directories are only parts of names, so none is
created.
"""

import contextlib
import errno
import logging
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from dcvideogen_jax import errors, leftovers

if TYPE_CHECKING:
  from etils import epath

# etils is imported for remote paths only: it takes a quarter of the time in
# which a program prints its --help.
Path: TypeAlias = "pathlib.Path | epath.Path"
CACHE_VARIABLE = "DCVIDEOGEN_CACHE"

_STORE = "gs://"
# Error numbers of a full disk, an exceeded quota and a file that is too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path(where: str | os.PathLike[str]) -> Path:
  """Returns a local path, or one of an object store for gs://.

  Raises:
    errors.UserError: for another scheme than gs://.
  """
  text = os.fspath(where)
  if is_remote(text):
    from etils import epath

    return epath.Path(_STORE + text.removeprefix("gs:").lstrip("/"))
  if "://" in text:
    raise errors.UserError(
      f"expected a path of this machine or one that begins with {_STORE},"
      f" found {text}"
    )
  return pathlib.Path(text)


def is_remote(where: str | os.PathLike[str]) -> bool:
  """Whether a path is in an object store."""
  # pathlib keeps only one of the two slashes.
  return os.fspath(where).startswith("gs:/")


def make_directory(where: str | os.PathLike[str]) -> Path:
  """Creates the directory and its parents.

  In an object store the directory is only listed, so that a wrong name or
  missing rights are reported at once.

  Returns:
    The directory as a path.

  Raises:
    errors.UserError: if the directory cannot be created, for instance because a
      parent is a file, or cannot be listed.
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
  """Yields a temporary path, and renames that file to `where` on success.

  The temporary name keeps the suffix, so writers that choose a format by
  suffix work. On any failure the temporary file is removed and `where` is left
  as it was.

  Args:
    where: the file to write.
    mode: its permissions, before the process's umask is applied.

  Raises:
    errors.UserError: if the file cannot be created, written or renamed. An
      OSError of the body about another file is raised unchanged, and so are
      errors of an object store, which are not the user's fault.
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
  from etils import epath

  with tempfile.TemporaryDirectory() as directory:
    temporary = pathlib.Path(directory) / target.name
    yield temporary
    epath.Path(temporary).copy(target, overwrite=True)


@contextlib.contextmanager
def atomic_directory(
  where: str | os.PathLike[str], keep_other: bool = False
) -> Iterator[pathlib.Path]:
  """Yields a temporary directory, and renames it to `where` on success.

  On any failure the temporary directory is removed with its contents.

  Args:
    where: a local directory that does not exist, or is empty.
    keep_other: whether to keep a directory that another process has put there
      meanwhile, instead of raising an error; this one's is then discarded.

  Raises:
    errors.UserError: as `atomic`; also if `where` exists and is not empty.
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

  Each file replaces one of the same name. Files in folders of the temporary
  directory go into folders of the same name, which are made. On any failure the
  temporary files are removed.

  Args:
    directory: a local directory; must exist.
    last: suffix of the files that are moved after all others, so that their
      presence shows that all files are there.

  Raises:
    errors.UserError: as `atomic`.
  """
  directory = pathlib.Path(directory)
  with _temporary(directory / "files", _create_directory) as temporary:
    yield temporary
    with writing(directory):
      made = sorted(
        (x for x in temporary.rglob("*") if x.is_file()),
        key=lambda x: (x.suffix == last, x.name),
      )
      for found in made:
        _flush(found)
      targets = [directory / found.relative_to(temporary) for found in made]
      for found, target in zip(made, targets, strict=True):
        target.parent.mkdir(exist_ok=True)
        os.replace(found, target)
      for folder in {directory, *(target.parent for target in targets)}:
        _flush(folder)


@contextlib.contextmanager
def lock(where: str | os.PathLike[str]) -> Iterator[bool]:
  """Tries to take a lock, without waiting; yields whether it was taken.

  The lock is an empty file, which exists while the lock is held. A killed
  process loses its locks. On a file system without locks every caller gets
  True, and a warning is logged.

  Args:
    where: a local file; its directory must exist.

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
      ):  # Another process has just released and removed the file.
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
  """Turns an OSError of the body into one sentence about `target`.

  The body must only write to `target`.

  Raises:
    errors.UserError: for any OSError of the body.
  """
  try:
    yield
  except OSError as e:
    raise errors.UserError(f"cannot write {target}: {e.strerror or e}") from e


def cache_directory() -> pathlib.Path:
  """Returns the directory for files that can be downloaded or made again.

  It is $DCVIDEOGEN_CACHE, or else dcvideogen_jax in the user's cache directory.
  """
  if chosen := os.environ.get(CACHE_VARIABLE):
    return pathlib.Path(chosen).expanduser()
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "dcvideogen_jax"


def is_full(error: OSError) -> bool:
  """Whether the error is a full disk, or a quota or size limit reached."""
  return error.errno in _FULL


def upload(source: str | os.PathLike[str], target: Path) -> None:
  """Copies all files below a local directory to the directory `target`."""
  from etils import epath

  for found in sorted(pathlib.Path(source).rglob("*")):
    if found.is_file():
      name = found.relative_to(source).as_posix()
      epath.Path(found).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _temporary(target: pathlib.Path, create) -> Iterator[pathlib.Path]:
  """Yields a locked temporary path beside `target`; removes it if still there.

  Args:
    target: the path that the caller renames the temporary one to.
    create: makes a file or directory at a given path and returns an open
      handle.

  Raises:
    errors.UserError: if the temporary path cannot be made, or for an OSError of
      the body about that path or about a full disk.
  """
  with writing(target):
    leftovers.sweep(target.parent)
    while True:
      # The stem is cut, as file systems limit names to 255 bytes.
      temporary = target.with_name(
        f"{leftovers.PREFIX}{leftovers.machine()}-{secrets.token_hex(4)}-{target.stem[:40]}"
        f"{target.suffix}"
      )
      # Another process's sweep may remove the path before it is locked.
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
  # The kernel applies the umask here. Reading it first would mean changing it
  # for a moment, in all threads.
  return os.open(where, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def _create_directory(where: pathlib.Path) -> int:
  where.mkdir()
  return os.open(where, os.O_RDONLY)


def _is_about(error: OSError, temporary: pathlib.Path) -> bool:
  """Whether an error is about a temporary path, its contents or a full disk."""
  if not isinstance(error.filename, str | bytes):  # Errors of writes have none.
    return is_full(error)
  return pathlib.Path(os.fsdecode(error.filename)).is_relative_to(temporary)


def _flush(where: pathlib.Path) -> None:
  """Waits until a file, or a directory's list of names, is on the disk."""
  handle = os.open(where, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError:
    if not where.is_dir():  # Not every file system flushes directories.
      raise
  finally:
    os.close(handle)
