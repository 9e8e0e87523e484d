"""Captioned clips from files, from TFDS and from the captioned world."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets, clip_images, clip_sources, video
from dcvideogen_jax.tiny import world
from tests.data import data_sets

SIZES = [buckets.Size(32, 64), buckets.Size(64, 32)]


def _moving(frames, height, width, seed=0):
  y, x = np.mgrid[:height, :width][..., None]
  t = np.arange(frames)[:, None, None, None]
  phase = np.random.default_rng(seed).uniform(0, 6, 3)
  return (127 + 90 * np.sin(0.1 * x + 0.07 * y + 0.3 * t + phase)).astype(
    np.uint8
  )


def _write_video(path, frames=12, height=48, width=80, fps=12.5):
  with video.VideoWriter(path, fps=fps) as writer:
    writer.write(_moving(frames, height, width))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("videos")
  _write_video(path / "a.mp4")
  _write_video(path / "b.mp4", frames=7, height=80, width=48)
  _write_video(path / "c.mp4", frames=5)
  content = (path / "a.mp4").read_bytes()
  (path / "d.mp4").write_bytes(content[: len(content) // 2])
  for name in "abcd":
    (path / f"{name}.txt").write_text(f"video {name}")
  return path


@pytest.fixture(scope="module")
def data_set(tmp_path_factory, folder):
  """The first two videos."""
  return data_sets.write(
    tmp_path_factory.mktemp("tfds"),
    [
      {
        "video": (folder / f"{name}.mp4").read_bytes(),
        "captions": [f"video {name}", "é"],
        "scores": [0.25, 0.5],
      }
      for name in "ab"
    ],
  )


def test_clips_of_files(folder):
  source = clip_sources.Folder(folder, fps=None)
  assert [source[i].file for i in range(len(source))] == [
    "a.mp4",
    "b.mp4",
    "c.mp4",
    "d.mp4",
  ]
  loaded = source.load(1, 6, SIZES)
  assert loaded.video.shape == (6, 64, 32, 3)
  assert loaded.meta == {
    "file": "b.mp4",
    "captions": ["video b"],
    "scores": None,
    "fps": 12.5,
    "file_fps": 12.5,
  }
  frames = [*video.read_frames(folder / "b.mp4", max_frames=6)]
  np.testing.assert_array_equal(loaded.first, frames[0])
  for found, frame in zip(loaded.video, frames, strict=True):
    np.testing.assert_array_equal(found, buckets.fit(frame, SIZES[1]))
  place = source.place(1, 6, SIZES)
  assert place == (SIZES[1], pytest.approx(7 / 12.5), 12.5)


@pytest.mark.parametrize("method", ["load", "place"])
@pytest.mark.parametrize(
  ("index", "words"),
  [(2, "it has 5 frames, fewer than 6"), (3, "it is "), (4, "it does not ex")],
)
def test_clips_that_cannot_be_used(folder, tmp_path, method, index, words):
  """The message does not contain the path of the local folder."""
  table = tmp_path / "t.csv"
  table.write_text("file,caption\nz.mp4,gone\na.mp4,there\n")
  source = clip_sources.Folder(folder, table, fps=None)
  with pytest.raises(errors.UserError, match=f"^{re.escape(words)}") as error:
    getattr(source, method)(index, 6, SIZES)
  assert str(folder) not in str(error.value)


def test_containers_may_claim_more_frames_than_they_have(folder, monkeypatch):
  real = video.probe

  def claim(path):
    return dataclasses.replace(real(path), frames=99)

  monkeypatch.setattr(video, "probe", claim)
  source = clip_sources.Folder(folder, fps=None)
  with pytest.raises(errors.UserError, match="it has 5 frames, fewer than 6"):
    source.load(2, 6, SIZES)


def test_clips_at_16_frames_per_second(folder):
  """5 frames at 12.5 per second take 0.4 s, which are 6 at 16 per second."""
  source = clip_sources.Folder(folder)
  words = "c.mp4 has 12.5 frames per second, fewer than 16: some are repeated"
  with pytest.warns(UserWarning, match=words):
    loaded = source.load(2, 6, SIZES)
  assert loaded.meta["fps"] == 16 and loaded.meta["file_fps"] == 12.5
  expected = clip_sources.Folder(folder, fps=None).load(2, 5, SIZES).video
  # At 0, 62.5 ... 312.5 ms, where the file has 0, 80 ... 320 ms.
  np.testing.assert_array_equal(loaded.video, expected[[0, 1, 2, 2, 3, 4]])
  for method in (source.place, source.load):
    with pytest.raises(
      errors.UserError, match="^it has 6 frames at 16 per second, fewer than 7"
    ):
      method(2, 7, SIZES)
  # Probing all files does not change what is read.
  source.look()
  assert source.place(2, 6, SIZES).seconds == 0.4


def test_sources_tell_themselves_apart(folder, tmp_path):
  one = clip_sources.Folder(folder).about()
  table = tmp_path / "t.csv"
  table.write_text("file,caption\na.mp4,other words\n")
  assert one == clip_sources.Folder(folder).about()
  assert one != clip_sources.Folder(folder, table).about()
  assert one["clips"] == 4
  assert one != clip_sources.Folder(folder, fps=None).about()
  worlds = [clip_sources.World(3, "train", seed).about() for seed in (0, 1)]
  assert worlds[0] != worlds[1]


def test_tfds_without_tensorflow(folder, data_set):
  source = clip_sources.TensorFlowDataset("tiny_clips", str(data_set), fps=None)
  assert len(source) == source.about()["clips"] == 2
  files = clip_sources.Folder(folder, fps=None)
  expected = {files[i].captions[0]: i for i in range(2)}
  for i in range(2):
    assert source[i].captions[1] == "é" and source[i].scores == (0.25, 0.5)
    same = expected[source[i].captions[0]]
    found = source.load(i, 6, SIZES)
    np.testing.assert_array_equal(found.video, files.load(same, 6, SIZES).video)
    assert found.meta["file"] == f"train/{i}" and found.meta["fps"] == 12.5
    assert source.place(i, 6, SIZES) == files.place(same, 6, SIZES)
  with pytest.raises(errors.UserError, match="^it has .* fewer than 99"):
    source.load(0, 99, SIZES)
  # Worker processes get pickled copies.
  again = pickle.loads(pickle.dumps(source))
  assert again[1] == source[1]


@pytest.mark.parametrize(
  ("name", "split", "words"),
  [
    ("no_such_clips", "train", "cannot read the data set no_such_clips in"),
    ("tiny_clips", "dusk", "Unknown split 'dusk'"),
  ],
)
def test_missing_data_sets(data_set, name, split, words):
  with pytest.raises(errors.UserError, match=words):
    clip_sources.TensorFlowDataset(name, str(data_set), split)


def test_the_world():
  source = clip_sources.World(3, "heldout", seed=2)
  assert len(source) == 3
  loaded = source.load(1, 4, [buckets.Size(32, 64)])
  scene, caption, clip = world.clip("heldout", 1, 2, 4, 32, 64)
  np.testing.assert_array_equal(loaded.video, clip)
  assert loaded.meta["captions"] == [caption] == [*source[1].captions]
  assert loaded.meta["scene"] == scene._asdict()
  assert loaded.meta["file"] == source[1].file
  assert source.place(1, 4, SIZES) == (SIZES[0], 4 / 16, 16.0)
  for count, split in ((0, "train"), (1, "dusk")):
    with pytest.raises(errors.UserError):
      clip_sources.World(count, split)


@pytest.mark.parametrize("stretch", [False, True])
def test_what_clip_sees(folder, stretch):
  loaded = clip_sources.Folder(folder).load(0, 2, [buckets.Size(32, 32)])
  image = loaded.first if stretch else loaded.video[0]
  assert image.shape == ((48, 80, 3) if stretch else (32, 32, 3))
  np.testing.assert_array_equal(
    loaded.pixels(16, stretch),
    clip_images.preprocess(image, 16, stretch=stretch),
  )
