"""Batches straight from captioned video files."""

import importlib.resources
import itertools
import json
import pathlib
import re
import warnings

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import (
  buckets,
  clip_sources,
  pipeline,
  tokenize,
  video,
)

TOKENIZER = (
  pathlib.Path(str(importlib.resources.files("dcvideogen_jax")))
  / "assets"
  / "dcvideogen_tiny"
  / "tokenizer"
)


def _texts(i):
  return [f"clip number {i}", f"a red ball rolls {i} times"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Five usable videos, two of them upright; one too short, one uncaptioned."""
  path = tmp_path_factory.mktemp("videos")
  y, x = np.mgrid[:40, :64][..., None]
  rows = []
  for i, frames in enumerate([8, 9, 10, 8, 8, 4, 8]):
    t = np.arange(frames)[:, None, None, None]
    clip = 120 + 60 * np.sin(0.1 * (x + i * y) + 0.2 * t + np.zeros(3))
    clip = clip.astype(np.uint8)
    with video.VideoWriter(path / f"{i}.mp4") as writer:
      writer.write(clip.swapaxes(1, 2) if i in (3, 4) else clip)
    rows.append({"file": f"{i}.mp4", "captions": _texts(i), "scores": [1, 1]})
  rows[-1] = {"file": "6.mp4"}
  (path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return path


def _config(folder, **changes):
  return {
    "source": "captioned_videos",
    "path": str(folder),
    "captions": str(folder / "table.jsonl"),
    "tokenizer": str(TOKENIZER),
    "frames": 8,
    "height": 32,
    "width": 64,
    "text_tokens": 12,
  } | changes


def _take(config, count, batch_size=2, seed=0, **options):
  iterator = pipeline.batches(
    config, batch_size=batch_size, seed=seed, **options
  )
  try:
    return list(itertools.islice(iterator, count))
  finally:
    iterator.close()


@pytest.mark.filterwarnings("ignore:2 of 7 videos")
def test_batches_hold_clips_with_one_of_their_captions(folder):
  tokenizer = tokenize.Tokenizer.from_directory(TOKENIZER)
  source = clip_sources.Folder(folder, folder / "table.jsonl")
  size = [buckets.Size(32, 64)]
  clips = [source.load(i, 8, size) for i in range(5)]
  seen, drawn = [], []
  config = _config(folder, image_size=16)
  for batch in _take(config, 10, batch_size=1):
    assert batch["video"].dtype == np.uint8
    assert batch["pixels"].shape == (1, 16, 16, 3)
    (number,) = [
      i for i, c in enumerate(clips) if (c.video == batch["video"][0]).all()
    ]
    texts = clips[number].meta["captions"]
    rows = [tokenizer([text], 12) for text in texts]
    (which,) = [
      i for i, (ids, _) in enumerate(rows) if (ids == batch["ids"]).all()
    ]
    np.testing.assert_array_equal(batch["mask"], rows[which][1])
    np.testing.assert_array_equal(
      batch["pixels"][0], clips[number].pixels(16, False)
    )
    seen.append(number)
    drawn.append(which)
  assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
  assert set(drawn) == {0, 1}


def test_what_cannot_be_used_is_told_once(folder):
  with pytest.warns(
    UserWarning,
    match=r"2 of 7 .* 5.mp4 \(it has 4 frames.*6.mp4 \(it has no capt",
  ):
    _take(_config(folder), 1)
  with pytest.raises(errors.UserError, match="no video can be used: 0.mp4"):
    _take(_config(folder, frames=99), 1)


@pytest.mark.filterwarnings("ignore:2 of 7 videos")
def test_captions_that_are_cut_are_counted(folder):
  tokenizer = tokenize.Tokenizer.from_directory(TOKENIZER)
  texts = [x for i in range(5) for x in _texts(i)]
  most = int(tokenizer.count(texts).max())
  longest = int((tokenizer.count(texts) == most).sum())
  with pytest.warns(UserWarning, match=f"^{longest} captions are cut to their"):
    _take(_config(folder, text_tokens=most - 1), 1)
  with warnings.catch_warnings():
    warnings.filterwarnings("error", ".* are cut to")
    _take(_config(folder, text_tokens=most), 1)


@pytest.mark.filterwarnings("ignore:2 of 7 videos")
def test_resuming_is_exact_and_a_batch_has_one_size(folder, monkeypatch):
  sizes = buckets.BUCKETS[32] | {
    "480": (buckets.Size(32, 64), buckets.Size(64, 32))
  }
  monkeypatch.setitem(buckets.BUCKETS, 32, sizes)
  config = _config(folder, bucket="480", height=None, width=None)
  iterator = pipeline.batches(config, batch_size=2, seed=3)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(4)]
  iterator.close()
  again = pipeline.batches(config, batch_size=2, seed=3, num_threads=1)
  again.set_state(state)
  for batch in expected:
    found = next(again)
    for name, values in batch.items():
      np.testing.assert_array_equal(found[name], values)
  again.close()
  shapes = [batch["video"].shape[2:4] for batch in expected]
  assert set(shapes) == {(32, 64), (64, 32)}


@pytest.fixture
def damaged(tmp_path):
  """Six videos; one is damaged in the middle, which probing does not notice."""
  rng = np.random.default_rng(0)
  for i in range(6):
    frames = rng.integers(0, 256, (16, 32, 64, 3), np.uint8)
    with video.VideoWriter(tmp_path / f"{i}.mp4") as writer:
      writer.write(frames)
    (tmp_path / f"{i}.txt").write_text(f"clip number {i}")
  content = bytearray((tmp_path / "2.mp4").read_bytes())
  middle = len(content) // 2
  content[middle : middle + 4000] = bytes(4000)
  (tmp_path / "2.mp4").write_bytes(content)
  with pytest.raises(errors.UserError, match="damaged"):
    list(video.read_frames(tmp_path / "2.mp4"))
  return tmp_path


@pytest.mark.parametrize("threads", [0, 3])
def test_a_damaged_video_is_replaced_in_every_run_alike(damaged, threads):
  config = _config(damaged, captions=None, frames=16)

  def start():
    return pipeline.batches(config, batch_size=2, seed=1, num_threads=threads)

  iterator = start()
  with pytest.warns(
    UserWarning, match="a clip of 2.mp4 is left out, .*damaged"
  ):
    whole = [next(iterator) for _ in range(9)]
  with pytest.warns(UserWarning, match=r"clips of 1 videos .*: 2.mp4 \(\d"):
    iterator.close()
  again = start()
  with pytest.warns(UserWarning, match="a clip of 2.mp4 is left out"):
    for _ in range(4):
      next(again)
    state = json.loads(json.dumps(again.get_state()))
    with pytest.warns(UserWarning, match="clips of 1 videos were left out"):
      again.close()
    again = start()
    again.set_state(state)
    for batch in whole[4:]:
      for name, values in next(again).items():
        np.testing.assert_array_equal(values, batch[name])
    again.close()


def test_nothing_but_damaged_videos_is_an_error(damaged):
  for path in damaged.glob("[013-5].mp4"):
    path.unlink()
  with pytest.raises(errors.UserError, match="none of 1 videos, one after"):
    _take(_config(damaged, captions=None, frames=16), 1)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"flip": True}, "unknown keys ['flip']"),
    ({"tokenizer": None}, "lacks ['tokenizer']"),
    ({"bucket": "480"}, "either a bucket or height and width, found '480'"),
    ({"width": None}, "either a bucket or height and width, found None"),
    (
      {"frames": 1.5},
      "of the data config must be a positive integer",
    ),
    ({"width": 65}, "32x65 is no multiple of 32"),
    ({"fps": 0}, "fps must be frames per second, from 0.1 to 1000"),
    ({"fps": "16"}, "fps must be frames per second, from 0.1 to 1000"),
    ({"path": "nowhere"}, "nowhere is not a folder of videos"),
  ],
)
def test_bad_configs(folder, changes, words):
  with pytest.raises(errors.UserError, match=re.escape(words)):
    _take(_config(folder, **changes), 1)
