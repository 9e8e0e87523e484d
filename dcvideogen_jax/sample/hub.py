"""Hugging Face repositories: their names, and downloads from them."""

import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable

from dcvideogen_jax import errors

# The repositories of DC-VideoGen by task, and the older one that holds both.
REPOSITORIES = {
  "t2v": "dc-ai/DC-Gen-Wan2.1-T2V-14B",
  "i2v": "dc-ai/DC-Gen-Wan2.1-I2V-14B",
}
OLDER = "nvidia/DC-VideoGen-Wan2.1-14B"
# The official code takes CLIP from here for the i2v repository, which has none.
CLIP = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"

# Longest error message of a library to pass on, in characters.
_REASON = 300


def is_repository(source: str | os.PathLike[str]) -> bool:
  """Returns whether this names a repository, "owner/name[@revision]".

  A file or directory that exists is not taken for a repository.
  """
  return (
    not os.path.exists(source)
    and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", os.fspath(source))
    is not None
  )


def name(source: str | os.PathLike[str]) -> str:
  """Returns a repository's name without its revision; "" for a directory."""
  if not is_repository(source):
    return ""
  return os.fspath(source).partition("@")[0]


def fetch(
  repository: str, choose: Callable[[list[str]], list[str]]
) -> pathlib.Path:
  """Fetches some files of a repository.

  If the network cannot be reached, files that were fetched before are used,
  with a warning.

  Args:
    repository: "owner/name[@revision]".
    choose: names of all files -> names of the files to fetch.

  Returns:
    The snapshot's directory, whose name is the commit.

  Raises:
    errors.UserError: if the repository cannot be fetched and is not in the
      cache.
  """
  import huggingface_hub  # Importing it takes a second.

  name, _, revision = repository.partition("@")
  snapshot = functools.partial(
    huggingface_hub.snapshot_download, name, revision=revision or None
  )
  try:
    names = huggingface_hub.list_repo_files(name, revision=revision or None)
  except Exception as e:  # Also from its network library.
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
  """Returns the snapshot in the cache if the hub was not reached, else None."""
  # The base class of transport errors has this name in the network library,
  # which differs between versions of huggingface_hub.
  names = {cls.__name__ for cls in type(e).__mro__}
  status = getattr(getattr(e, "response", None), "status_code", 0)
  on_the_way = isinstance(e, ConnectionError | TimeoutError)
  if not (on_the_way or "TransportError" in names or status >= 500):
    return None
  try:
    return pathlib.Path(snapshot(local_files_only=True))
  except Exception as missing:
    # huggingface_hub calls a snapshot incomplete if it lacks any file, even one
    # that the task does not need.
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
