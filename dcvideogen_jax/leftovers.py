"""Removes temporary files of killed processes, but none of living ones.

A process that writes holds a lock (flock) on its temporary file, whose name
begins with `PREFIX` and a code of the machine. The lock ends with the process.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import time

PREFIX = ".new-"
# Locks say nothing about temporary files of other machines or on a file system
# without locks. Such files are removed after this time without a write.
_IDLE = 24 * 3600  # seconds


def sweep(directory: pathlib.Path) -> None:
  """Removes the temporary files of killed processes from a local directory.

  Files that a living process is writing are locked, and stay.
  """
  with contextlib.suppress(OSError):
    for entry in os.scandir(directory):
      if entry.name.startswith(PREFIX):
        with contextlib.suppress(OSError):
          _remove_if_left(pathlib.Path(entry.path))


@functools.cache
def machine() -> str:
  """Returns a code of this machine; other machines may not see its locks."""
  return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def try_lock(handle: int) -> bool | None:
  """Tries to lock an open file or directory, without waiting.

  Returns:
    Whether the lock was taken; None if the file system has no locks.
  """
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # NFS cannot lock directories, other file systems nothing.
    return None
  return True


def is_at(handle: int, where: pathlib.Path) -> bool:
  """Whether a path still names the open file."""
  try:
    return os.path.samestat(os.fstat(handle), where.lstat())
  except FileNotFoundError:
    return False


def _remove_if_left(where: pathlib.Path) -> None:
  access = os.O_RDONLY if where.is_dir() else os.O_RDWR
  handle = os.open(where, access | os.O_NOFOLLOW | os.O_NONBLOCK)
  try:
    locked = try_lock(handle)
    own = locked and where.name.startswith(f"{PREFIX}{machine()}-")
    if locked is not False and (own or _is_idle(where)):
      logging.info("removing %s, which a killed process has left", where)
      remove(where)
  finally:
    os.close(handle)


def _is_idle(where: pathlib.Path) -> bool:
  times = [x.lstat().st_mtime for x in (where, *where.rglob("*"))]
  return time.time() - max(times) > _IDLE


def remove(where: pathlib.Path) -> None:
  """Removes a file or a directory with its contents, if it exists."""
  if where.is_dir():
    shutil.rmtree(where, ignore_errors=True)
  else:
    where.unlink(missing_ok=True)
