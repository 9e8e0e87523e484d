"""Clips in ArrayRecord shards: exact, atomic, and loud when damaged."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from dcvideogen_jax import errors
from dcvideogen_jax.data import records


def _clips(count, shape=(3, 8, 10, 3), seed=0):
  rng = np.random.default_rng(seed)
  return list(rng.integers(0, 256, (count, *shape), np.uint8))


def _write_raw(path, contents):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for content in contents:
    writer.write(content)
  writer.close()


@pytest.mark.parametrize("shape", [(3, 8, 10, 3), (1, 1, 1, 3), (2, 5, 300, 3)])
def test_a_record_is_exact(shape):
  clip = _clips(1, shape)[0]
  back = records.decode(records.encode(clip))
  assert back.dtype == np.uint8
  np.testing.assert_array_equal(back, clip)


def test_a_view_that_is_not_contiguous_is_exact():
  clip = _clips(1)[0][::-1, :, ::2]
  np.testing.assert_array_equal(records.decode(records.encode(clip)), clip)


@pytest.mark.parametrize(
  ("clip", "error"),
  [
    (np.zeros((2, 4, 4, 3), np.float32), TypeError),
    (np.zeros((4, 4, 3), np.uint8), ValueError),
    (np.zeros((2, 4, 4, 4), np.uint8), ValueError),
    (np.zeros((0, 4, 4, 3), np.uint8), ValueError),
  ],
)
def test_only_clips_are_encoded(clip, error):
  with pytest.raises(error, match="a clip must be"):
    records.encode(clip)


@pytest.mark.parametrize(
  "damage",
  [
    lambda r: b"",
    lambda r: r[:10],
    lambda r: b"XXXX" + r[4:],
    lambda r: r[:-1],
    lambda r: r + b"\0",
    lambda r: r[:4] + b"\xff" * 12 + r[16:],
  ],
)
def test_a_damaged_record_is_refused(damage):
  with pytest.raises(ValueError):
    records.decode(damage(records.encode(_clips(1)[0])))


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (4, 1), (5, 2), (11, 3)])
def test_shards_come_back_in_order(tmp_path, count, shards):
  clips = _clips(count)
  directory = tmp_path / "deep" / "clips"
  assert (
    records.write_shards(iter(clips), directory, clips_per_shard=4) == count
  )
  assert len(list(directory.iterdir())) == shards
  source = records.ClipSource(directory)
  assert len(source) == count
  for i in reversed(range(count)):
    assert list(source[i]) == ["video"]
    np.testing.assert_array_equal(source[i]["video"], clips[i])


def test_clips_may_differ_in_size(tmp_path):
  clips = [*_clips(2), *_clips(2, (5, 4, 6, 3))]
  records.write_shards(clips, tmp_path / "clips")
  source = records.ClipSource(tmp_path / "clips")
  assert [source[i]["video"].shape for i in range(4)] == [
    c.shape for c in clips
  ]


def test_extra_files_are_made_after_the_last_clip(tmp_path):
  seen = []

  def clips():
    for clip in _clips(3):
      seen.append(len(seen))
      yield clip

  records.write_shards(
    clips(), tmp_path / "clips", extra=lambda: {"note.txt": f"{seen} ü"}
  )
  note = (tmp_path / "clips" / "note.txt").read_text(encoding="utf-8")
  assert note == "[0, 1, 2] ü"


def test_a_failing_producer_leaves_nothing(tmp_path):
  def clips():
    yield from _clips(3)
    raise KeyError("the caller's")

  with pytest.raises(KeyError):
    records.write_shards(clips(), tmp_path / "clips", clips_per_shard=2)
  assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_blamed_on_the_one_that_is_written(tmp_path):
  def clips():
    yield from _clips(1)
    (tmp_path / "source.mp4").read_bytes()

  with pytest.raises(FileNotFoundError) as e:
    records.write_shards(clips(), tmp_path / "clips")
  assert e.value.filename == str(tmp_path / "source.mp4")
  assert list(tmp_path.iterdir()) == []


def test_no_clips_are_told(tmp_path):
  with pytest.raises(errors.UserError, match="no clips"):
    records.write_shards([], tmp_path / "clips")
  assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
  (tmp_path / "clips").mkdir()
  records.write_shards(_clips(1), tmp_path / "clips")  # empty is fine
  before = sorted((tmp_path / "clips").iterdir())
  with pytest.raises(errors.UserError, match="is not an empty folder"):
    records.write_shards(_clips(2), tmp_path / "clips")
  assert sorted((tmp_path / "clips").iterdir()) == before
  assert len(records.ClipSource(tmp_path / "clips")) == 1


def test_a_parent_that_is_a_file_is_told(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(errors.UserError, match="cannot create"):
    records.write_shards(_clips(1), tmp_path / "file" / "clips")


_LIMITED = """
import resource, sys
import numpy as np
from dcvideogen_jax import errors
from dcvideogen_jax.data import records
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
rng = np.random.default_rng(0)
try:
  records.write_shards(rng.integers(0, 256, (9, 8, 64, 64, 3), np.uint8),
                       sys.argv[1])
except errors.UserError as e:
  print(e)
  sys.exit(2)
"""


@pytest.mark.parametrize("limit", [0, 1000, 917_504])
def test_a_file_size_limit_is_told_and_leaves_nothing(tmp_path, limit):
  result = subprocess.run(
    [sys.executable, "-c", _LIMITED, tmp_path / "clips", str(limit)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert result.returncode == 2, result.stderr
  assert result.stdout.startswith(f"cannot write {tmp_path / 'clips'}")
  assert result.stdout.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_a_folder_without_shards_is_told(tmp_path):
  for path in (tmp_path, tmp_path / "missing"):
    with pytest.raises(errors.UserError, match="prepare-clips"):
      records.ClipSource(path)


@pytest.mark.parametrize("content", [b"", b"text" * 30_000])
def test_a_file_that_is_no_shard_is_told(tmp_path, content):
  (tmp_path / f"a{records.SUFFIX}").write_bytes(content)
  with pytest.raises(errors.UserError, match="damaged shard") as e:
    records.ClipSource(tmp_path)
  assert "\n" not in str(e.value)


def test_shards_without_clips_are_told(tmp_path):
  _write_raw(tmp_path / f"a{records.SUFFIX}", [])
  with pytest.raises(errors.UserError, match="hold no clips"):
    records.ClipSource(tmp_path)


def test_a_flipped_bit_is_told_and_only_there(tmp_path):
  clips = _clips(4, (8, 64, 64, 3))
  records.write_shards(clips, tmp_path / "clips")
  shard = next((tmp_path / "clips").iterdir())
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  source = records.ClipSource(tmp_path / "clips")
  damaged = []
  for i, clip in enumerate(clips):
    try:
      np.testing.assert_array_equal(source[i]["video"], clip)
    except errors.UserError as e:
      assert f"record {i} of {tmp_path / 'clips'} is damaged" in str(e)
      damaged.append(i)
  assert len(damaged) == 1


def test_records_of_others_are_told(tmp_path):
  good = records.encode(_clips(1)[0])
  _write_raw(tmp_path / f"a{records.SUFFIX}", [good, b"an mp4, say"])
  source = records.ClipSource(tmp_path)
  assert source[0]["video"].shape == (3, 8, 10, 3)
  with pytest.raises(errors.UserError, match="record 1 .* is damaged"):
    source[1]


def test_beyond_the_end_is_an_error(tmp_path):
  records.write_shards(_clips(2), tmp_path / "clips")
  with pytest.raises((IndexError, ValueError)):
    records.ClipSource(tmp_path / "clips")[2]
