"""Training and evaluation clips of a split, from files made here."""

import dataclasses
import hashlib
import json

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors, files, packages
from dcvideogen_jax.data import records, video
from dcvideogen_jax.tiny import clips, download


def _moving(frames, height, width, seed):
  y, x = np.mgrid[:height, :width][..., None]
  t = np.arange(frames)[:, None, None, None]
  phase = np.random.default_rng(seed).uniform(0, 6, 3)
  return (127 + 90 * np.sin(0.1 * x + 0.07 * y + 0.3 * t + phase)).astype(
    np.uint8
  )


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """Fills a cache: two training videos, a photo, and a held-out video.

  Returns:
    The cache's folder and the manifest.
  """
  folder = tmp_path_factory.mktemp("media")
  cache = folder / "cache" / "media"
  cache.mkdir(parents=True)
  for name, frames, size in (
    ("long.mp4", 120, (100, 140)),
    ("short.mp4", 40, (100, 100)),
    ("kept.mp4", 90, (70, 100)),
  ):
    with video.VideoWriter(cache / name) as writer:
      writer.write(_moving(frames, *size, seed=len(name)))
  photo = _moving(1, 120, 130, 3)[0]
  PIL.Image.fromarray(photo).save(cache / "view.png")
  entries = {
    path.name: packages.Entry(
      name=path.name,
      package="none",
      version="0",
      source="wheel",
      archive_sha256="0" * 64,
      member=path.name,
      sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
      licence="CC0-1.0",
      attribution=f"maker of {path.name}",
      split="heldout" if path.name == "kept.mp4" else "train",
    )
    for path in sorted(cache.iterdir())
  }
  return cache.parent, entries


@pytest.fixture
def entries(media, monkeypatch):
  """The manifest, without a network."""
  cache, entries = media
  entries = dict(entries)
  monkeypatch.setattr(download, "manifest", lambda: entries)
  monkeypatch.setenv(files.CACHE_VARIABLE, str(cache))
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  return entries


def _read(folder):
  source = records.ClipSource(folder)
  return [source[i]["video"] for i in range(len(source))]


def test_training_clips(entries, tmp_path):
  number, sources = clips.prepare(tmp_path / "a", "train", count=20)
  found = _read(tmp_path / "a")
  assert {c.shape for c in found} == {(24, 96, 96, 3)}
  assert len({c.tobytes() for c in found}) == len(found)
  note = json.loads((tmp_path / "a" / "sources.json").read_text())
  counts = {name: row["clips"] for name, row in note["sources"].items()}
  assert set(counts) == {"long.mp4", "short.mp4", "view.png"}
  assert counts["view.png"] == 6
  assert counts["long.mp4"] > 2 * counts["short.mp4"]
  assert sum(counts.values()) == len(found) == number <= 20 and sources == 3
  assert note["sources"]["long.mp4"]["attribution"] == "maker of long.mp4"
  clips.prepare(tmp_path / "b", "train", count=20, exclude=["short*"])
  other = json.loads((tmp_path / "b" / "sources.json").read_text())
  assert set(other["sources"]) == {"long.mp4", "view.png"}
  # The clips of one file do not depend on the other files.
  assert other["sources"]["view.png"]["clips"] == 6
  np.testing.assert_array_equal(found[-6:], _read(tmp_path / "b")[-6:])


def test_held_out_clips(entries, tmp_path):
  clips.prepare(tmp_path / "a", "heldout", count=4)
  long, short = (_read(tmp_path / "a" / f"frames{n}") for n in (64, 16))
  assert len(long) == len(short) == 4
  for one, other in zip(long, short, strict=True):
    assert one.shape == (64, 64, 64, 3)
    np.testing.assert_array_equal(one[:16], other)
  note = json.loads((tmp_path / "a" / "frames64" / "sources.json").read_text())
  assert list(note["sources"]) == ["kept.mp4"]


def test_clips_of_other_shapes(entries, tmp_path):
  clips.prepare(tmp_path / "a", "train", count=10, frames=40, size=32)
  assert {c.shape for c in _read(tmp_path / "a")} == {(40, 32, 32, 3)}
  clips.prepare(tmp_path / "b", "heldout", count=2, frames=80, size=32)
  shapes = {c.shape for c in _read(tmp_path / "b" / "frames80")}
  assert shapes == {(80, 32, 32, 3)}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--clips=0"], "--clips must be positive, not 0"),
    (["--size=-1"], "--size must be positive, not -1"),
    (["--split=heldout", "--frames=16"], "--frames must be more than 16 for"),
    (["--exclude=*"], "leaves no file of the train split"),
  ],
)
def test_bad_flags_are_told_in_a_line(programs, tmp_path, flags, message):
  output = tmp_path / "a"
  told = programs.run("launch.prepare_clips", f"--output={output}", *flags)
  assert told.code == 2
  assert told.stderr.count("\n") == 1 and message in told.stderr
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", download.SPLITS)
def test_an_output_in_use_is_told_before_any_work(programs, tmp_path, split):
  (tmp_path / "mine.txt").write_text("x")
  told = programs.run(
    "launch.prepare_clips", f"--output={tmp_path}", f"--split={split}"
  )
  assert told.code == 2
  assert told.stderr.count("\n") == 1
  assert "is not an empty folder" in told.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_that_cannot_be_fetched_is_told(entries, tmp_path):
  entries["gone.mp4"] = dataclasses.replace(
    entries["long.mp4"], name="gone.mp4"
  )
  words = r"^cannot fetch none 0 \(gone.mp4\)"
  with pytest.raises(errors.UserError, match=words):
    clips.prepare(tmp_path / "out", "train")
  assert not (tmp_path / "out").exists()
