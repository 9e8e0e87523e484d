"""What killed processes leave behind, told from what living ones write.

Whoever writes holds a lock (flock) on a temporary name, which begins with
`PREFIX` and names the machine, and gives it up when killed.
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
# What another machine, or a file system without locks, left is removed once
# nothing has been written to it for so many seconds.
_IDLE = 24 * 3600


def sweep(directory: pathlib.Path) -> None:
  """Removes what killed processes have left in a directory of this machine.

  What a living process is writing is locked, and stays.
  """
  with contextlib.suppress(OSError):
    for entry in os.scandir(directory):
      if entry.name.startswith(PREFIX):
        with contextlib.suppress(OSError):
          _remove_if_left(pathlib.Path(entry.path))


@functools.cache
def machine() -> str:
  """Stands for this machine: on others the locks held here may not count."""
  return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def try_lock(handle: int) -> bool | None:
  """Locks an open file or directory; None where there are no locks."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # NFS locks no directories, and other systems nothing.
    return None
  return True


def is_at(handle: int, where: pathlib.Path) -> bool:
  """Whether an open file is still the one of that name."""
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
  if where.is_dir():
    shutil.rmtree(where, ignore_errors=True)
  else:
    where.unlink(missing_ok=True)
