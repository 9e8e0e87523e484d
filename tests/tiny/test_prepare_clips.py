"""The program that makes training and evaluation clips, on files made here."""

import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import files
from dcvideogen_jax.data import records, video
from dcvideogen_jax.tiny import download

ROOT = pathlib.Path(__file__).parents[2]
# The program, with another manifest.
PROGRAM = """
import json, sys
from dcvideogen_jax.tiny import download
with open(sys.argv.pop(1)) as f:
  entries = {name: download.Entry(**row) for name, row in json.load(f).items()}
download.manifest = lambda: entries
from dcvideogen_jax.programs import common, prepare_clips
common.run(prepare_clips.main)
"""


def _moving(frames, height, width, seed):
  y, x = np.mgrid[:height, :width][..., None]
  t = np.arange(frames)[:, None, None, None]
  phase = np.random.default_rng(seed).uniform(0, 6, 3)
  return (127 + 90 * np.sin(0.1 * x + 0.07 * y + 0.3 * t + phase)).astype(
    np.uint8
  )


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """A filled cache and its manifest: two training videos, a photo, one held
  out."""
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
  rows = {
    path.name: {
      "name": path.name,
      "package": "none",
      "version": "0",
      "source": "wheel",
      "archive_sha256": "0" * 64,
      "member": path.name,
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
      "licence": "CC0-1.0",
      "attribution": f"maker of {path.name}",
      "split": "heldout" if path.name == "kept.mp4" else "train",
    }
    for path in sorted(cache.iterdir())
  }
  (folder / "manifest.json").write_text(json.dumps(rows))
  return folder


def _run(media, *arguments):
  return subprocess.run(
    [
      sys.executable,
      "-c",
      PROGRAM,
      str(media / "manifest.json"),
      *map(str, arguments),
    ],
    cwd=ROOT,
    env={
      "PATH": "/usr/bin:/bin",
      "HOME": str(media),
      "JAX_PLATFORMS": "cpu",
      "PIP_NO_INDEX": "1",
      files.CACHE_VARIABLE: str(media / "cache"),
    },
    capture_output=True,
    text=True,
  )


def _read(folder):
  source = records.ClipSource(folder)
  return [source[i]["video"] for i in range(len(source))]


def test_training_clips(media, tmp_path):
  result = _run(media, f"--output={tmp_path / 'a'}", "--clips=20")
  assert result.returncode == 0, result.stderr
  clips = _read(tmp_path / "a")
  assert {c.shape for c in clips} == {(24, 96, 96, 3)}
  assert len({c.tobytes() for c in clips}) == len(clips)
  note = json.loads((tmp_path / "a" / "sources.json").read_text())
  counts = {name: row["clips"] for name, row in note["sources"].items()}
  assert set(counts) == {"long.mp4", "short.mp4", "view.png"}
  assert counts["view.png"] == 6
  assert counts["long.mp4"] > 2 * counts["short.mp4"]
  assert sum(counts.values()) == len(clips) <= 20
  assert note["sources"]["long.mp4"]["attribution"] == "maker of long.mp4"
  assert f"{len(clips)} clips from 3 files" in result.stdout
  assert "cutting" in result.stderr
  again = _run(
    media, f"--output={tmp_path / 'b'}", "--clips=20", "--exclude=short*"
  )
  assert again.returncode == 0, again.stderr
  other = json.loads((tmp_path / "b" / "sources.json").read_text())
  assert set(other["sources"]) == {"long.mp4", "view.png"}
  # What is cut from one file does not depend on the other files.
  assert other["sources"]["view.png"]["clips"] == 6
  np.testing.assert_array_equal(clips[-6:], _read(tmp_path / "b")[-6:])


def test_held_out_clips(media, tmp_path):
  result = _run(
    media, f"--output={tmp_path / 'a'}", "--split=heldout", "--clips=4"
  )
  assert result.returncode == 0, result.stderr
  long, short = (_read(tmp_path / "a" / f"frames{n}") for n in (64, 16))
  assert len(long) == len(short) == 4
  for one, other in zip(long, short, strict=True):
    assert one.shape == (64, 64, 64, 3)
    np.testing.assert_array_equal(one[:16], other)
  note = json.loads((tmp_path / "a" / "frames64" / "sources.json").read_text())
  assert list(note["sources"]) == ["kept.mp4"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--clips=0"], "--clips must be positive, not 0"),
    (["--exclude=*"], "leaves no file of the train split"),
  ],
)
def test_bad_flags_are_told_in_a_line(media, tmp_path, flags, message):
  result = _run(media, f"--output={tmp_path / 'a'}", *flags)
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1 and message in result.stderr
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", download.SPLITS)
def test_an_output_in_use_is_told_before_any_work(media, tmp_path, split):
  (tmp_path / "mine.txt").write_text("x")
  result = _run(media, f"--output={tmp_path}", f"--split={split}")
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
  assert "is not an empty folder" in result.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_that_cannot_be_fetched_is_told(media, tmp_path):
  rows = json.loads((media / "manifest.json").read_text())
  rows["gone.mp4"] = rows["long.mp4"] | {"name": "gone.mp4"}
  (tmp_path / "manifest.json").write_text(json.dumps(rows))
  (tmp_path / "cache").symlink_to(media / "cache")
  result = _run(tmp_path, f"--output={tmp_path / 'out'}")
  assert result.returncode == 2
  last = result.stderr.strip().splitlines()[-1]
  assert last.startswith("error: cannot fetch none 0 (gone.mp4)")
  assert not (tmp_path / "out").exists()
