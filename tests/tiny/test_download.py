"""The manifest, and downloads from archives made here, without a network."""

import dataclasses
import hashlib
import io
import pathlib
import re
import tarfile
import zipfile

import pytest

from dcvideogen_jax import errors, files, packages
from dcvideogen_jax.tiny import download

FIRST, SECOND = b"first clip" * 50, b"second clip" * 70


def _sha(content):
  return hashlib.sha256(content).hexdigest()


def _entry(name, content, archive, source, member, split="train"):
  return packages.Entry(
    name=name,
    package="tinyclips",
    version="1.2",
    source=source,
    archive_sha256=_sha(archive.read_bytes()),
    member=member,
    sha256=_sha(content),
    licence="CC0-1.0",
    attribution="nobody",
    split=split,
  )


def _wheel(folder):
  path = folder / "tinyclips-1.2-py3-none-any.whl"
  info = "tinyclips-1.2.dist-info"
  with zipfile.ZipFile(path, "w") as z:
    z.writestr("tinyclips/a.mp4", FIRST)
    z.writestr("tinyclips/b.mp4", SECOND)
    z.writestr(
      f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyclips\nVersion: 1.2"
    )
    z.writestr(
      f"{info}/WHEEL",
      "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )
    z.writestr(f"{info}/RECORD", "")
  return path


def _tarball(path):
  with tarfile.open(path, "w:gz") as t:
    for name, content in (("a.mp4", FIRST), ("b.mp4", SECOND)):
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(content)
      t.addfile(member, io.BytesIO(content))
  return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """Makes a wheel of two files, which the real pip finds in a local folder."""
  shop = tmp_path / "shop"
  shop.mkdir()
  path = _wheel(shop)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
  _use(
    monkeypatch,
    _entry("a.mp4", FIRST, path, "wheel", "tinyclips/a.mp4"),
    _entry("b.mp4", SECOND, path, "wheel", "tinyclips/b.mp4"),
  )
  return path


def _use(monkeypatch, *entries):
  monkeypatch.setattr(
    download, "manifest", lambda: {e.name: e for e in entries}
  )


@pytest.fixture
def tarball(tmp_path, monkeypatch):
  """Makes an npm package with the two files, and a fake npm that serves it."""
  path = _tarball(tmp_path / "shop.tgz")
  npm = tmp_path / "bin" / "npm"
  npm.parent.mkdir()
  npm.write_text(
    "#!/bin/sh\n"
    '[ "$1 $2" = "pack tinyclips@1.2" ] || { echo "npm error 404"; exit 1; }\n'
    f'for last; do :; done; cp "{path}" "$last/tinyclips-1.2.tgz"\n'
  )
  npm.chmod(0o755)
  monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
  _use(
    monkeypatch,
    _entry("a.mp4", FIRST, path, "npm", "package/a.mp4"),
    _entry("b.mp4", SECOND, path, "npm", "package/b.mp4"),
  )
  return path


@pytest.mark.parametrize("shop", ["wheel", "tarball"])
def test_one_download_brings_all_members(tmp_path, request, shop):
  archive = request.getfixturevalue(shop)
  cache = tmp_path / "cache"
  path = download.fetch("a.mp4", cache)
  assert path.read_bytes() == FIRST
  archive.unlink()
  assert download.fetch("b.mp4", cache).read_bytes() == SECOND
  assert sorted(p.name for p in path.parent.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_damaged_cache_is_mended(tmp_path, wheel):
  path = download.fetch("a.mp4", tmp_path)
  path.write_bytes(FIRST[:-1] + b"!")
  assert download.fetch("a.mp4", tmp_path).read_bytes() == FIRST


def test_the_cache_can_be_moved_by_the_environment(
  tmp_path, monkeypatch, wheel
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
  assert files.cache_directory() == tmp_path / "x" / "dcvideogen_jax"
  monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "c"))
  path = download.fetch("a.mp4")
  assert tmp_path / "c" in path.parents and path.read_bytes() == FIRST


def test_nothing_to_be_had_is_told_in_a_sentence(tmp_path, wheel):
  wheel.unlink()
  with pytest.raises(errors.UserError) as e:
    download.fetch("a.mp4", tmp_path / "cache")
  message = str(e.value)
  assert "cannot fetch tinyclips 1.2 (a.mp4)" in message
  assert "network" in message and "\n" not in message


def test_an_archive_with_another_hash_is_refused(tmp_path, wheel):
  content = wheel.read_bytes()
  with zipfile.ZipFile(wheel, "a") as z:
    z.writestr("more.txt", "not in the original")
  assert wheel.read_bytes() != content
  with pytest.raises(errors.UserError, match="cannot fetch|should have SHA"):
    download.fetch("a.mp4", tmp_path / "cache")
  assert not list((tmp_path / "cache" / "media").iterdir())


def test_an_npm_archive_with_another_hash_is_refused(tmp_path, tarball):
  tarball.write_bytes(tarball.read_bytes() + b"\0")
  with pytest.raises(errors.UserError, match="should have SHA-256"):
    download.fetch("a.mp4", tmp_path / "cache")
  assert not list((tmp_path / "cache" / "media").iterdir())


@pytest.mark.parametrize(
  ("member", "content", "message"),
  [
    ("package/b.mp4", FIRST, "should have SHA-256"),
    ("package/none.mp4", FIRST, "cannot read package/none.mp4"),
  ],
)
def test_a_wrong_member_is_refused(
  tmp_path, monkeypatch, tarball, member, content, message
):
  _use(monkeypatch, _entry("a.mp4", content, tarball, "npm", member))
  with pytest.raises(errors.UserError, match=message):
    download.fetch("a.mp4", tmp_path / "cache")
  assert not list((tmp_path / "cache" / "media").iterdir())


def test_without_npm_the_sentence_says_so(tmp_path, monkeypatch, tarball):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.UserError, match="install npm"):
    download.fetch("a.mp4", tmp_path / "cache")


def test_npm_failing_is_told_in_a_sentence(tmp_path, monkeypatch, tarball):
  entry = download.manifest()["a.mp4"]
  other = dataclasses.replace(entry, version="9.9")
  _use(monkeypatch, other)
  with pytest.raises(errors.UserError, match="npm error 404"):
    download.fetch("a.mp4", tmp_path / "cache")


def test_an_unknown_name_is_told(tmp_path):
  with pytest.raises(errors.UserError, match="no file named 'nothing.mp4'"):
    download.fetch("nothing.mp4", tmp_path)


def test_a_cache_that_is_a_file_is_told(tmp_path, wheel):
  (tmp_path / "file").write_text("x")
  with pytest.raises(errors.UserError, match="cannot create"):
    download.fetch("a.mp4", tmp_path / "file")


def test_an_sdist_is_checked_before_pip_runs_it(tmp_path):
  entry = download.manifest()["cockatoo.mp4"]
  assert entry.source == "sdist"
  command = packages._pip(entry, tmp_path)
  assert "--no-binary=imageio" in command
  pinned = pathlib.Path(command[command.index("-r") + 1]).read_text()
  assert pinned == f"imageio==2.4.1 --hash=sha256:{entry.archive_sha256}\n"


# --- the manifest ------------------------------------------------------------


@pytest.mark.parametrize(
  "entry", download.manifest().values(), ids=lambda e: e.name
)
def test_entries_are_complete(entry):
  digest = re.compile("[0-9a-f]{64}")
  assert digest.fullmatch(entry.sha256)
  assert digest.fullmatch(entry.archive_sha256)
  assert entry.source in ("wheel", "sdist", "npm")
  assert entry.split in download.SPLITS
  assert entry.licence and entry.attribution and entry.member
  assert pathlib.Path(entry.name).name == entry.name


def test_whole_clips_are_held_out():
  held_out = download.names("heldout")
  assert sorted(held_out) == [
    "carphone.mp4",
    "city.mpg",
    "cockatoo.mp4",
    "runner.mp4",
  ]
  seen = {download.manifest()[name].sha256 for name in download.names("train")}
  assert not seen & {download.manifest()[name].sha256 for name in held_out}
  assert len(seen) == len(download.names("train"))
  assert len(seen) + len(held_out) == len(download.manifest())
