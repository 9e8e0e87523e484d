"""Encoded clips: records, folders of parts, batches for training."""

import itertools
import json
import re

import ml_dtypes
import numpy as np
import pytest
from grain import checkpoint as grain_checkpoint
from safetensors import numpy as safetensors

from dcvideogen_jax import errors
from dcvideogen_jax.data import latents, parts, pipeline
from tests.data import encoded_clips

TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("latents") / "made"
  encoded_clips.two_sizes(path)
  return path


def _batches(path, batch_size=2, seed=0, tokens=TOKENS, **options):
  config = {"source": "latents", "path": str(path), "text_tokens": tokens}
  own = ("keys", "latent_frames")
  config |= {k: options.pop(k) for k in own if k in options}
  return pipeline.batches(config, batch_size=batch_size, seed=seed, **options)


def _take(path, count, **options):
  iterator = _batches(path, **options)
  try:
    return list(itertools.islice(iterator, count))
  finally:
    iterator.close()


def _numbers(batches):
  """The clips' numbers, batch by batch."""
  return [b["base"][:, 0, 0, 0, 0].astype(int).tolist() for b in batches]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_records_keep_everything(dtype):
  arrays, meta = encoded_clips.clip(3, texts=[2] * 11, dtype=dtype)
  meta |= {"captions": ["é"], "scene": {"colour": "red"}}
  record = latents.encode(arrays, meta)
  found, about = latents.decode(record)
  assert about == meta and found.keys() == arrays.keys()
  for name in ("base", "deep"):
    assert found[name].dtype == dtype
    np.testing.assert_array_equal(found[name], arrays[name])
  # Texts keep their order: number 10 comes after number 9.
  for text, expected in zip(found["text"], arrays["text"], strict=True):
    np.testing.assert_array_equal(text, expected)
  assert latents.decode(record, ("deep",))[0].keys() == {"deep"}
  assert record == latents.encode(*_reordered(arrays, meta))


def _reordered(arrays, meta):
  return dict(reversed(arrays.items())), meta


def test_records_are_safetensors():
  arrays, meta = encoded_clips.clip(1)
  found = safetensors.load(latents.encode(arrays, meta))
  np.testing.assert_array_equal(found["text.0"], arrays["text"][0])


def test_what_is_no_record():
  record = latents.encode(*encoded_clips.clip(0))
  for bad in (b"", b"1234567", record[:40], record[:-1], b"x" * 200):
    with pytest.raises(ValueError, match="no record of encoded clips"):
      latents.decode(bad)
  for arrays, words in (
    ({"video": np.zeros(2, np.float32)}, "has no 'video'"),
    ({"base": np.zeros(2)}, "base is float64"),
  ):
    with pytest.raises(ValueError, match=words):
      latents.encode(arrays, {})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("data_offsets", [-8, 40]),  # Begins before the data.
    ("data_offsets", [0, 96]),  # Takes the bytes of both arrays.
    ("data_offsets", [48.0, 96.0]),
    ("data_offsets", None),
    ("shape", [-3, -4]),
    ("shape", [3, 4, 1.0]),
    ("shape", None),
    ("dtype", "BF16"),
    ("dtype", []),
  ],
)
def test_arrays_that_are_not_where_a_record_says(field, value):
  arrays = {"text": [np.ones((3, 4), np.float32)] * 2}
  record = latents.encode(arrays, {})
  length = int.from_bytes(record[:8], "little")
  header = json.loads(record[8 : 8 + length])
  header["text.1"][field] = value
  text = json.dumps(header).encode()
  spoilt = len(text).to_bytes(8, "little") + text + record[8 + length :]
  with pytest.raises(ValueError, match="no record of encoded clips"):
    latents.decode(spoilt, ("image",))


def test_a_record_is_nothing_but_its_arrays():
  record = latents.encode({"image": np.ones((3, 4), np.float32)}, {})
  latents.decode(record)
  with pytest.raises(ValueError, match="not fully covered"):
    latents.decode(record + bytes(4))


@pytest.mark.parametrize(
  ("keys", "value"),
  [
    (["records"], "12"),
    (["records"], True),
    (["facts"], None),
    (["settings"], []),
    (["buckets"], -1),
    (["buckets", "24x48"], float("inf")),
    (["buckets", "24x48", "records"], -1),
    (["buckets", "24x48", "shapes"], [[]]),
    (["buckets", "24x48", "shapes", "deep"], [2, 3, 4, 6.0]),
    (["parts", "part-00000"], 5),
    (["parts", "part-00000", "24x48"], None),
  ],
)
def test_fields_of_the_index_that_make_no_sense(folder, tmp_path, keys, value):
  def change(content):
    index = holder = json.loads(content)
    for key in keys[:-1]:
      holder = holder[key]
    holder[keys[-1]] = value
    return json.dumps(index).encode()

  copy = _spoilt(folder, tmp_path, "index.json", change)
  with pytest.raises(errors.UserError, match=f"index.json.* its {keys[0]} "):
    latents.read_index(copy)


def test_buckets_that_no_part_has(folder, tmp_path):
  def change(content):
    index = json.loads(content)
    index["buckets"]["24x49"] = index["buckets"].pop("24x48")
    return json.dumps(index).encode()

  copy = _spoilt(folder, tmp_path, "index.json", change)
  with pytest.raises(errors.UserError, match="bucket 24x49, of which no part"):
    latents.Records(copy, "24x49")


def test_index(folder):
  index = latents.read_index(folder)
  assert index["records"] == 12 and index["settings"] == encoded_clips.SETTINGS
  assert index["facts"] == encoded_clips.FACTS
  assert index["buckets"]["48x24"] == {
    "records": 3,
    "shapes": {"base": [2, 4, 3, 2], "deep": [2, 4, 3, 6], "text": None},
  }
  assert index["parts"] == {
    "part-00000": {"24x48": 5},
    "part-00001": {"24x48": 4, "48x24": 1},
    "part-00002": {"48x24": 2},
  }


def test_batches_have_equal_shapes_and_padded_texts(folder):
  for batch in _take(folder, 8, tokens=8):
    assert batch.keys() == {"base", "deep", "text"}
    assert batch["base"].shape in {(2, 2, 3, 4, 2), (2, 2, 4, 3, 2)}
    assert batch["text"].shape == (2, 8, 4)
    for name, values in batch.items():
      assert values.dtype == np.float32, name
    for number, text in zip(
      batch["base"][:, 0, 0, 0, 0], batch["text"], strict=True
    ):
      # Wide clips have texts of 3 and 7 tokens, tall ones a text of 2.
      which = int(text[0, 0] - 10 * number - 1)
      length = 2 if number >= 20 else (3, 7)[which]
      assert (text[:length] == 10 * number + which + 1).all()
      assert not text[length:].any()


def test_a_text_is_not_cut_once_it_is_encoded(folder):
  with pytest.raises(errors.UserError, match="^a text has 7 tokens, expected"):
    _take(folder, 8, tokens=5)


def test_only_the_first_frames_of_latents(folder):
  whole, cut = (_take(folder, 4, latent_frames=n) for n in (None, 1))
  for expected, found in zip(whole, cut, strict=True):
    assert expected["base"].shape[1] == expected["deep"].shape[1] == 2
    for name in ("base", "deep"):
      np.testing.assert_array_equal(found[name], expected[name][:, :1])
    np.testing.assert_array_equal(found["text"], expected["text"])


def test_arrays_are_those_written(folder):
  for batch in _take(folder, 4):
    for number, deep in zip(_numbers([batch])[0], batch["deep"], strict=True):
      shape = (2, 4, 3) if number >= 20 else (2, 3, 4)
      np.testing.assert_array_equal(
        deep, encoded_clips.clip(number, shape)[0]["deep"]
      )


def test_bfloat16_is_read_as_float32(tmp_path):
  clips = [encoded_clips.clip(i, dtype=ml_dtypes.bfloat16) for i in range(2)]
  encoded_clips.write(tmp_path, [("24x48", clip) for clip in clips])
  (batch,) = _take(tmp_path, 1)
  for number, deep in zip(_numbers([batch])[0], batch["deep"], strict=True):
    assert deep.dtype == np.float32
    np.testing.assert_array_equal(deep, clips[number][0]["deep"])


def test_keys(folder):
  (batch,) = _take(folder, 1, keys=("deep",))
  assert batch.keys() == {"deep"}
  with pytest.raises(errors.UserError, match="has no image, only base, deep"):
    _batches(folder, keys=("deep", "image"))


def test_an_epoch_has_every_clip_once_and_buckets_their_share(folder):
  numbers = _numbers(_take(folder, 36, batch_size=1))
  numbers = [number for (number,) in numbers]
  wide = [n for n in numbers if n < 9]
  tall = [n for n in numbers if n >= 20]
  assert len(wide) == 27 and len(tall) == 9
  for clips, size in ((wide, 9), (tall, 3)):
    epochs = [clips[i : i + size] for i in range(0, len(clips), size)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert len(set(epochs[0])) == size
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed_and_not_on_threads(folder):
  one, many, none, other = (
    _numbers(_take(folder, 12, seed=seed, num_threads=threads))
    for seed, threads in ((5, 1), (5, 3), (5, 0), (6, 1))
  )
  assert one == many == none != other


@pytest.mark.parametrize("done", [0, 1, 7])
def test_resuming_is_exact(folder, done, tmp_path):
  """The position is restored from a checkpoint; captions are the same too."""
  iterator = _batches(folder, seed=1)
  for _ in range(done):
    next(iterator)
  handler = grain_checkpoint.CheckpointHandler()
  handler.save(tmp_path, iterator)
  expected = [next(iterator) for _ in range(5)]
  iterator.close()
  again = _batches(folder, seed=1, num_threads=1)
  handler.restore(tmp_path, again)
  for batch in expected:
    found = next(again)
    for name, values in batch.items():
      np.testing.assert_array_equal(found[name], values)
  again.close()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_have_their_own_clips_and_the_same_buckets(folder, count):
  shards = [
    _take(folder, 12, batch_size=1, shard_index=i, shard_count=count)
    for i in range(count)
  ]
  seen = [set(sum(_numbers(batches), [])) for batches in shards]
  assert sum(map(len, seen)) == len(set.union(*seen))
  assert set.union(*seen) == {*range(9), *range(20, 23)}
  shapes = [[b["base"].shape for b in batches] for batches in shards]
  assert all(each == shapes[0] for each in shapes)


def test_small_buckets_are_left_out_with_a_warning(folder):
  with pytest.warns(UserWarning, match="48x24 has 3 clips, fewer than 4"):
    batches = _take(folder, 8, shard_index=3, shard_count=4)
  assert {b["base"].shape for b in batches} == {(2, 2, 3, 4, 2)}


@pytest.mark.parametrize(
  ("scores", "expected"),
  [
    (None, [0.5, 0.5]),
    ([0, 0], [0.5, 0.5]),
    ([0, 3], [0, 1]),
    ([0.9, 1], [0.9**10 / (1 + 0.9**10), 1 / (1 + 0.9**10)]),
    ([9e200, 10e200], [0.9**10 / (1 + 0.9**10), 1 / (1 + 0.9**10)]),
  ],
)
def test_captions_are_drawn_by_their_scores(tmp_path, scores, expected):
  clip = encoded_clips.clip(0, texts=(1, 1), scores=scores)
  np.testing.assert_allclose(latents.caption_weights(2, scores), expected)
  encoded_clips.write(tmp_path, [("24x48", clip)])
  batches = _take(tmp_path, 20, batch_size=25)
  second = np.mean([b["text"][:, 0, 0] == 2 for b in batches])
  assert second == pytest.approx(expected[1], abs=0.07)


def test_negative_prompt(tmp_path):
  text = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  parts.write_negative(tmp_path, text)
  found = latents.negative(tmp_path)
  np.testing.assert_array_equal(found, text)
  more = latents.padded(found, 5)
  np.testing.assert_array_equal(more[:3], text)
  assert more.shape == (5, 4) and not more[3:].any()
  with pytest.raises(errors.UserError, match="has 3 tokens, .* text_tokens 2"):
    latents.padded(found, 2)
  with pytest.raises(errors.UserError, match="made without a text encoder"):
    latents.negative(tmp_path / "nowhere")


def _spoilt(folder, tmp_path, name, change):
  """Copies the folder with one file changed, or missing if `change` is None."""
  copy = tmp_path / "copy"
  for path, content in encoded_clips.content(folder).items():
    if path == name:
      content = change and change(content)
    if content is not None:
      (copy / path).parent.mkdir(parents=True, exist_ok=True)
      (copy / path).write_bytes(content)
  return copy


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    ("index.json", None, "has not finished"),
    ("index.json", lambda x: x[:50], "is damaged"),
    ("index.json", lambda x: b"[" * 100_000, "nested too deep"),
    ("index.json", lambda x: b"[]", "cannot read"),
    ("index.json", lambda x: b'{"format": 1}', "lacks buckets, facts"),
    ("index.json", lambda x: b'{"format": 9}', "has the format 9, expected 1"),
    ("part-00001/48x24.array_record", None, "is missing or damaged"),
    ("part-00000/24x48.array_record", lambda x: x[:999], "is missing or dam"),
    (
      "index.json",
      lambda x: x.replace(b'"24x48": 5', b'"24x48": 6'),
      "has 5 records, expected 6",
    ),
  ],
)
def test_damaged_folders(folder, tmp_path, name, change, words):
  copy = _spoilt(folder, tmp_path, name, change)
  with pytest.raises(errors.UserError, match=re.escape(words)):
    _batches(copy)


def test_damaged_records(tmp_path):
  arrays, _ = encoded_clips.clip(0)
  encoded_clips.write(
    tmp_path / "a", [("24x48", (arrays, {"file": "no scores"}))]
  )
  with pytest.raises(errors.UserError, match="is damaged: 'scores'"):
    _take(tmp_path / "a", 1)


def test_records_of_another_shape_than_the_index_says(folder, tmp_path):
  def change(content):
    index = json.loads(content)
    index["buckets"]["24x48"]["shapes"]["deep"][-1] = 9
    return json.dumps(index).encode()

  copy = _spoilt(folder, tmp_path, "index.json", change)
  with pytest.raises(errors.UserError, match=r"deep is \(2, 3, 4, 6\), exp"):
    _take(copy, 4)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"frames": 8}, "unknown keys ['frames']"),
    ({"path": None}, "lacks ['path']"),
    ({"text_tokens": 0}, "text_tokens of the data config must be a positive"),
    ({"latent_frames": 0}, "latent_frames of the data config must be a positi"),
  ],
)
def test_bad_configs(folder, changes, words):
  config = {"source": "latents", "path": str(folder)} | changes
  with pytest.raises(errors.UserError, match=re.escape(words)):
    pipeline.batches(config, batch_size=2, seed=0)
