"""Repositories of Hugging Face: their names, and fetching from them."""

import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable

from dcvideogen_jax import errors

# DC-VideoGen by its task, and the repository that held both before.
REPOSITORIES = {
  "t2v": "dc-ai/DC-Gen-Wan2.1-T2V-14B",
  "i2v": "dc-ai/DC-Gen-Wan2.1-I2V-14B",
}
OLDER = "nvidia/DC-VideoGen-Wan2.1-14B"
# Where CLIP is that the official code takes for the repository without it.
CLIP = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"

# Characters of a library's message that are passed on.
_REASON = 300


def is_repository(source: str | os.PathLike[str]) -> bool:
  """Whether this is a Hugging Face repository, "owner/name[@revision]".

  What exists as a file or directory is none.
  """
  return (
    not os.path.exists(source)
    and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", os.fspath(source))
    is not None
  )


def name(source: str | os.PathLike[str]) -> str:
  """The name of a repository without its revision; "" for a directory."""
  if not is_repository(source):
    return ""
  return os.fspath(source).partition("@")[0]


def fetch(
  repository: str, choose: Callable[[list[str]], list[str]]
) -> pathlib.Path:
  """Fetches what `choose` takes of the names of a repository's files.

  Where the network cannot be reached, what was fetched before is used, and a
  warning says so.

  Returns:
    The snapshot's directory, whose name is the commit.

  Raises:
    errors.UserError: if it cannot be fetched and is not in the cache.
  """
  import huggingface_hub  # Takes a second, and is seldom needed.

  name, _, revision = repository.partition("@")
  snapshot = functools.partial(
    huggingface_hub.snapshot_download, name, revision=revision or None
  )
  try:
    names = huggingface_hub.list_repo_files(name, revision=revision or None)
  except Exception as e:  # Its errors, and those of its network library.
    if (path := _fetched_before(snapshot, e)) is None:
      raise _unreachable(repository, e) from e
    warnings.warn(
      f"{repository} cannot be reached ({_reason(e)}), so what was fetched"
      f" before is used: {path.name}",
      stacklevel=2,
    )
    return path
  chosen = choose(names)
  try:
    return pathlib.Path(snapshot(allow_patterns=chosen))
  except Exception as e:
    raise _unreachable(repository, e) from e


def _fetched_before(
  snapshot: Callable[..., str], e: Exception
) -> pathlib.Path | None:
  """The copy that is here, if the repository could not even be asked."""
  # The network library's base of errors on the way to the server and back has
  # this name; it is another library from one version of the hub to the next.
  names = {cls.__name__ for cls in type(e).__mro__}
  status = getattr(getattr(e, "response", None), "status_code", 0)
  on_the_way = isinstance(e, ConnectionError | TimeoutError)
  if not (on_the_way or "TransportError" in names or status >= 500):
    return None
  try:
    return pathlib.Path(snapshot(local_files_only=True))
  except Exception as missing:
    # Complete for one task is not complete for the library.
    path = getattr(missing, "snapshot_path", None)
    return path and pathlib.Path(path)


def _unreachable(repository: str, e: Exception) -> errors.UserError:
  name, hint = repository.partition("@")[0], ""
  if name in REPOSITORIES.values():
    hint = f"; the same model is published as {OLDER} too"
  elif name == OLDER:
    hint = f"; the same models are {' and '.join(REPOSITORIES.values())} now"
  return errors.UserError(
    f"{repository} is no directory here and could not be fetched: "
    f"{_reason(e)}{hint}"
  )


def _reason(e: Exception) -> str:
  reason = " ".join(str(e).split()) or repr(e)
  return reason if len(reason) <= _REASON else reason[:_REASON] + "..."
