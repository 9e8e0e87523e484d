"""Where the parts of a published model lie, and fetching them.

Known are the directories of DC-VideoGen (`nvidia/DC-VideoGen-Wan2.1-14B`,
`dc-ai/DC-Gen-Wan2.1-*`), of Wan 2.1 in diffusers' form and of Wan 2.1 itself.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from dcvideogen_jax import errors

TASKS = ("t2v", "i2v")

# Where a part may lie, in the order in which they are tried. {task} is t2v or
# i2v. A `*` stands for any characters; "." is the directory itself.
_PLACES = {
  "transformer": (
    "transformer_{task}",
    "transformer",
    "diffusion_pytorch_model*.safetensors*",
  ),
  "dc_ae_v": ("dc-ae-v*.pt", "dc_ae_v", "autoencoder"),
  "wan_vae": ("vae", "Wan2.1_VAE*.pth"),
  "text_encoder": ("text_encoder", "models_t5_*.pth"),
  "tokenizer": ("tokenizer", "google/umt5-xxl"),
  "image_encoder": ("image_encoder", "models_clip_*.pth"),
  "scheduler": ("scheduler/scheduler_config.json",),
}
# A part that is a whole directory when one of its files is found in the root.
_ROOT = "diffusion_pytorch_model*"


class Paths(NamedTuple):
  """Where each part lies; None for what is not there."""

  transformer: pathlib.Path | None = None
  dc_ae_v: pathlib.Path | None = None
  wan_vae: pathlib.Path | None = None
  text_encoder: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  image_encoder: pathlib.Path | None = None
  scheduler: pathlib.Path | None = None


def find(directory: str | os.PathLike[str], task: str) -> Paths:
  """Looks for the parts of a model in a directory.

  Args:
    directory: as published.
    task: "t2v" or "i2v".

  Raises:
    errors.UserError: if there is no such directory, or several files could be
      the same part.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise errors.UserError(f"there is no directory {directory}")
  return Paths(**{part: _find(directory, part, task) for part in _PLACES})


def _find(directory, part, task):
  for place in _PLACES[part]:
    found = sorted(directory.glob(place.format(task=task)))
    if place.startswith(_ROOT) and found:
      return directory
    if len(found) > 1:
      names = ", ".join(path.name for path in found)
      raise errors.UserError(f"{directory} holds several {part}: {names}")
    if found:
      return found[0]
  return None


def require(paths: Paths, parts: Sequence[str], source: object) -> None:
  """Raises one UserError that names all parts that are missing."""
  missing = [part for part in parts if getattr(paths, part) is None]
  if not missing:
    return
  wanted = "; ".join(
    f"{part} (one of {', '.join(_PLACES[part])})" for part in missing
  )
  raise errors.UserError(f"{source} has no {wanted}")


def is_repository(source: str | os.PathLike[str]) -> bool:
  """Whether this is a Hugging Face repository, "owner/name[@revision]"."""
  return (
    not pathlib.Path(source).exists()
    and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", os.fspath(source))
    is not None
  )


def download(repository: str, task: str) -> pathlib.Path:
  """Fetches the files of one task from Hugging Face, or finds them cached.

  Args:
    repository: "owner/name@revision"; the revision is a commit, a tag or a
      branch. Without one the newest commit is taken, and the path that is
      returned ends in it.
    task: "t2v" or "i2v"; the files of the other are left out.

  Returns:
    The snapshot's directory, whose name is the commit.

  Raises:
    errors.UserError: if it cannot be fetched and is not in the cache.
  """
  import huggingface_hub  # Takes a second, and is seldom needed.
  import huggingface_hub.errors

  name, _, revision = repository.partition("@")
  (other,) = set(TASKS) - {task}
  try:
    path = huggingface_hub.snapshot_download(
      name,
      revision=revision or None,
      ignore_patterns=[f"transformer_{other}/*", "assets/*", "examples/*"],
    )
  except (
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.LocalEntryNotFoundError,
    huggingface_hub.errors.HFValidationError,
    OSError,
    ValueError,
  ) as e:
    reason = str(e).strip().splitlines()[0] if str(e).strip() else repr(e)
    raise errors.UserError(
      f"{repository} is no directory here and could not be fetched: {reason}"
    ) from e
  return pathlib.Path(path)
