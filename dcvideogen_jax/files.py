"""Writing files so that nothing half-written is ever left behind."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from dcvideogen_jax import errors


def make_directory(path: str | os.PathLike[str]) -> pathlib.Path:
  """Creates the directory and its parents.

  Raises:
    errors.UserError: if a parent is a file or cannot be written to.
  """
  directory = pathlib.Path(path)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f"cannot create the output directory {directory}: {e.strerror or e}"
    ) from e
  return directory


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path` and renames it on success.

  The temporary name keeps the suffix, so writers that choose a format by
  suffix work. On any failure the temporary file is removed and `path` is left
  as it was.

  Raises:
    errors.UserError: if the file cannot be created, written or renamed.
  """
  path = pathlib.Path(path)
  temporary = None
  try:
    handle, name = tempfile.mkstemp(
      prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = pathlib.Path(name)
    yield temporary
    # After writing: some writers replace the file by a private one.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)
  except OSError as e:
    raise errors.UserError(f"cannot write {path}: {e.strerror or e}") from e
  finally:
    if temporary is not None:
      temporary.unlink(missing_ok=True)
