"""Batches: shapes, determinism, exact resume, disjoint shards, errors."""

import json

import ml_collections
import numpy as np
import pytest
import takes

from dcvideogen_jax import errors
from dcvideogen_jax.data import pipeline, records
from dcvideogen_jax.tiny import synthetic, world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  path = tmp_path_factory.mktemp("records") / "clips"
  records.write_shards(takes.numbered(12), path, clips_per_shard=5)
  return path


@pytest.fixture
def configs(shards, folder):
  return {
    "records": {"source": "records", "path": str(shards), **takes.SIZE},
    "videos": {"source": "videos", "path": str(folder), **takes.SIZE},
    "synthetic": {"source": "synthetic", **takes.SIZE},
    "world": {"source": "world", **takes.SIZE},
    "mix": {"source": "mix", "path": str(shards), **takes.SIZE},
  }


@pytest.mark.parametrize("source", pipeline.CLIPS)
def test_batches_have_the_shape_asked_for(configs, source):
  for batch in takes.take(configs[source], 3):
    assert batch.shape == (3, 4, 16, 24, 3) and batch.dtype == np.uint8


@pytest.mark.parametrize("source", pipeline.CLIPS)
def test_order_and_content_do_not_depend_on_threads(configs, source):
  config = configs[source] | {"reverse": True, "max_stride": 2}
  one, many, none, other = (
    takes.take(config, 4, seed=seed, num_threads=threads)
    for seed, threads in ((5, 1), (5, 7), (5, 0), (6, 1))
  )
  np.testing.assert_array_equal(one, many)
  np.testing.assert_array_equal(one, none)
  assert np.any(np.array(one) != np.array(other))
  assert np.any(one[0] != one[1])


@pytest.mark.parametrize("source", pipeline.CLIPS)
@pytest.mark.parametrize("done", [0, 1, 9])
def test_resume_is_exact(configs, source, done):
  """Through JSON, and into another number of threads."""
  iterator = pipeline.batches(configs[source], batch_size=3, seed=1)
  for _ in range(done):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator)["video"] for _ in range(3)]
  iterator.close()
  again = pipeline.batches(configs[source], batch_size=3, seed=1, num_threads=2)
  again.set_state(state)
  np.testing.assert_array_equal(
    [next(again)["video"] for _ in range(3)], expected
  )
  again.close()


def test_every_clip_comes_once_an_epoch_and_in_a_new_order(configs):
  batches = np.array(takes.take(configs["records"], 12, batch_size=3))
  seen = (batches[:, :, 0, 0, 0, 0] // 16).reshape(3, 12)
  for epoch in seen:
    assert sorted(epoch) == list(range(12))
  assert len({tuple(epoch) for epoch in seen}) == 3


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_disjoint_and_complete(configs, count):
  seen = []
  for index in range(count):
    batches = takes.take(
      configs["records"],
      24 // count,
      batch_size=1,
      shard_index=index,
      shard_count=count,
    )
    numbers = {int(b[0, 0, 0, 0, 0] // 16) for b in batches}
    assert len(numbers) == 12 // count
    seen += numbers
  assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("source", ["synthetic", "world", "mix"])
def test_processes_generate_different_clips(configs, source):
  one, other = (
    np.concatenate(
      takes.take(configs[source], 10, shard_index=index, shard_count=2)
    )
    for index in range(2)
  )
  assert not {c.tobytes() for c in one} & {c.tobytes() for c in other}


def test_processes_crop_differently(tmp_path):
  """Two processes, each with one copy of the same clip."""
  clip = next(takes.numbered(1))
  records.write_shards([clip, clip], tmp_path / "clips")
  config = {"source": "records", "path": tmp_path / "clips", **takes.SIZE}
  one, other = (
    np.array(takes.take(config, 10, batch_size=1, shard_index=i, shard_count=2))
    for i in range(2)
  )
  assert np.any(one != other, axis=(1, 2, 3, 4, 5)).mean() > 0.8


def test_crops_are_cut_from_everywhere_and_intact(configs):
  config = configs["records"] | {"flip": False}
  clips = np.concatenate(takes.take(config, 80))
  first, top, left = (clips[:, 0, 0, 0, i] for i in range(3))
  first = first % 16
  t, y, x = np.mgrid[:4, :16, :24]
  for clip, *at in zip(clips, first, top, left, strict=True):
    part = clip - np.array([clip[0, 0, 0, 0], *at[1:]], np.uint8)
    np.testing.assert_array_equal(part, np.stack([t, y, x], -1))
  for found, most in ((first, 3), (top, 4), (left, 8)):
    assert set(found.tolist()) == set(range(most + 1))


@pytest.mark.parametrize(
  ("option", "axis", "channel"), [("flip", 2, 2), ("reverse", 0, 0)]
)
@pytest.mark.parametrize("on", [True, False])
def test_mirrored_and_backwards(configs, option, axis, channel, on):
  config = configs["records"] | {"flip": False, "reverse": False, option: on}
  clips = np.concatenate(takes.take(config, 40)).astype(int)
  forwards = np.array(
    [np.diff(c[..., channel], axis=axis).mean() > 0 for c in clips]
  )
  share = forwards.mean()
  assert 0.3 < share < 0.7 if on else share == 1


def test_strides(configs):
  config = configs["records"] | {"max_stride": 5}
  clips = np.concatenate(takes.take(config, 40)).astype(int)
  steps = np.diff(clips[..., 0], axis=1).reshape(len(clips), -1)
  assert (steps == steps[:, :1]).all()
  # 7 frames allow a clip of 4 with a stride of 2 at most.
  assert set(steps[:, 0].tolist()) == {1, 2}


def test_mix_keeps_its_weights(configs, monkeypatch):
  grey = np.full((4, 16, 24, 3), 250, np.uint8)
  monkeypatch.setattr(synthetic, "clip", lambda seed, *size: grey)
  for weights in ((0.8, 0.2), (1, 3)):
    config = configs["mix"] | {"weights": weights}
    clips = np.concatenate(takes.take(config, 40))
    share = (clips[:, 0, 0, 0, 1] == 250).mean()
    assert share == pytest.approx(weights[1] / sum(weights), abs=0.01)


def _shows(monkeypatch):
  """Replaces clips of the world and synthetic ones by constant levels."""

  def scene(split, index, seed, *size):
    return None, "", np.full((*size, 3), 100 + world.SPLITS.index(split))

  shape = (4, 16, 24, 3)
  monkeypatch.setattr(world, "clip", scene)
  monkeypatch.setattr(synthetic, "clip", lambda *a: np.full(shape, 200))


@pytest.mark.parametrize(
  ("parts", "weights"),
  [
    (("world", "records"), (1, 1)),
    (("synthetic", "world"), (3, 1)),
    (("records", "synthetic", "world"), (2, 3, 5)),
    (("world",), (1,)),
  ],
)
def test_mix_of_any_parts(configs, monkeypatch, parts, weights):
  _shows(monkeypatch)
  config = configs["mix"] | {"parts": parts, "weights": weights}
  if "records" not in parts:
    config["path"] = None
  clips = np.concatenate(takes.take(config, 40))[:, 0, 0, 0]
  # The records have their row in the second channel.
  shown = {
    "world": clips[:, 1] == 100,
    "synthetic": clips[:, 1] == 200,
    "records": clips[:, 1] < 20,
  }
  for part, weight in zip(parts, weights, strict=True):
    share = shown[part].mean()
    assert share == pytest.approx(weight / sum(weights), abs=0.01)


@pytest.mark.parametrize("split", world.SPLITS)
def test_the_world_shows_its_split(configs, split):
  config = configs["world"] | {"split": split}
  found = takes.take(
    config, 2, seed=3, batch_size=2, shard_index=1, shard_count=2
  )
  expected = [world.clip(split, i, 3, 4, 16, 24)[2] for i in (1, 3, 5, 7)]
  np.testing.assert_array_equal(np.concatenate(found), expected)


def test_configs_may_be_config_dicts(configs):
  config = ml_collections.ConfigDict(configs["mix"])
  np.testing.assert_array_equal(
    takes.take(config, 1), takes.take(configs["mix"], 1)
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"source": "tapes"}, "'tapes'"),
    ({"source": None}, "lacks .'source'"),
    ({"frams": 3}, "unknown keys .'frams'"),
    ({"frames": 0}, "frames .* positive integer, not 0"),
    ({"height": 16.0}, "height .* positive integer, not 16.0"),
    ({"max_stride": -1}, "max_stride"),
    ({"weights": (1, 0)}, "weights"),
    ({"weights": (1,)}, "weights"),
    ({"source": "mix", "weights": (1, 2, 3)}, "must be 2 positive numbers"),
    ({"source": "mix", "parts": ("world", "films")}, "'films'"),
    ({"source": "mix", "parts": ("world", "mix")}, "parts"),
    ({"source": "mix", "parts": ("world", "world")}, "different ones"),
    ({"source": "mix", "parts": (), "weights": ()}, "parts"),
    ({"source": "mix", "path": None}, "'records' needs a path"),
    ({"source": "world", "split": "test"}, "'heldout'.*not 'test'"),
    ({"max_zoom": 0.5}, "max_zoom"),
    ({"path": None}, "needs a path"),
    ({"path": "/nowhere"}, "/nowhere"),
    ({"frames": 8}, "7x20x32, smaller than the 8x16x24"),
    ({"width": 33}, "smaller"),
  ],
)
def test_bad_configs_are_told_in_a_sentence(configs, change, message):
  with pytest.raises(errors.UserError, match=message):
    pipeline.batches(configs["records"] | change, batch_size=2, seed=0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size"),
    ({"seed": -1}, "negative: -1"),
    ({"shard_index": 2, "shard_count": 2}, "shard_index"),
    ({"shard_index": 12, "shard_count": 13}, "12 clips, too few for 13"),
  ],
)
def test_bad_arguments_are_told(configs, options, message):
  arguments = {"batch_size": 2, "seed": 0} | options
  with pytest.raises(errors.UserError, match=message):
    pipeline.batches(configs["records"], **arguments)


def test_a_source_that_the_caller_cannot_use_is_told(configs):
  words = r"must be one of \('latents', 'captioned_videos'\), not 'world'"
  with pytest.raises(errors.UserError, match=words):
    pipeline.batches(
      configs["world"], batch_size=2, seed=0, sources=pipeline.CAPTIONED
    )


@pytest.mark.parametrize("threads", [0, 3])
def test_a_damaged_record_is_told_when_it_is_met(tmp_path, threads):
  path = tmp_path / "clips"
  rng = np.random.default_rng(0)
  clips = rng.integers(0, 256, (6, 4, 40, 40, 3), np.uint8)
  records.write_shards(clips, path)
  shard = next(path.iterdir())
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  config = {"source": "records", "path": path, **takes.SIZE}
  with pytest.raises(errors.UserError, match="record . of .* is damaged"):
    takes.take(config, 10, num_threads=threads)


def test_a_smaller_clip_further_on_is_told(tmp_path):
  clips = [*takes.numbered(1), *takes.numbered(1, height=10)]
  records.write_shards(clips, tmp_path / "clips")
  config = {"source": "records", "path": tmp_path / "clips", **takes.SIZE}
  with pytest.raises(errors.UserError, match="7x10x32 is smaller"):
    takes.take(config, 4)


def _images(**changes):
  return {
    "source": "synthetic",
    **takes.SIZE,
    "images": 0.4,
    "image_frames": 2,
  } | (changes)


def test_a_share_of_batches_are_images():
  """Batches 3 and 5 of five, each image a frame of the clips it replaces."""
  mixed, clips = takes.take(_images(), 10), takes.take(_images(images=0.0), 10)
  frames = [batch.shape[1] for batch in mixed]
  assert frames == [4, 4, 1, 4, 1] * 2
  for batch, whole in zip(mixed, clips, strict=True):
    if batch.shape[1] == 4:
      np.testing.assert_array_equal(batch, whole)
      continue
    assert batch.shape == (6, 1, 16, 24, 3)
    for i, image in enumerate(batch[:, 0]):
      found = [np.array_equal(image, frame) for frame in whole[i // 2]]
      assert any(found)
    assert not np.array_equal(batch[0], batch[1])


def test_images_resume_exactly_in_any_number_of_threads():
  whole = takes.take(_images(), 6, num_threads=3)
  iterator = pipeline.batches(_images(), batch_size=3, seed=0, num_threads=1)
  for _ in range(3):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  other = pipeline.batches(_images(), batch_size=3, seed=0, num_threads=0)
  other.set_state(state)
  for expected in whole[3:]:
    np.testing.assert_array_equal(next(other)["video"], expected)
  other.close()


@pytest.mark.parametrize("change", [{"images": 1.0}, {"image_frames": 5}])
def test_shares_of_images_that_mean_nothing(change):
  with pytest.raises(errors.UserError, match="images of the data config"):
    takes.take(_images(**change), 1)
