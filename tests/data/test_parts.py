"""Folders of encoded clips: written part by part, in any order, once."""

import json
import pathlib
import shutil

import pytest

from dcvideogen_jax import errors, leftovers
from dcvideogen_jax.data import parts, pipeline
from tests.data import encoded_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("latents") / "made"
  encoded_clips.two_sizes(path)
  return path


def test_bytes_do_not_depend_on_order_or_interruption(folder, tmp_path):
  other = tmp_path / "other"
  parts.begin(other, encoded_clips.SETTINGS)
  clips = encoded_clips.wide_and_tall()
  with (
    pytest.raises(KeyError),
    parts.Writer(other, 1, encoded_clips.FACTS) as writer,
  ):
    writer.write(clips[5][0], *clips[5][1])
    raise KeyError
  # A killed process leaves such a folder.
  left = other / f".new-{leftovers.machine()}-00000000-part-00002"
  left.mkdir()
  (left / "24x48.array_record").write_bytes(b"half")
  assert not any(parts.is_done(other, n) for n in range(3))
  for number in (2, 0, 1):
    assert parts.finish(other, 3) is None
    with parts.Writer(other, number, encoded_clips.FACTS) as writer:
      for bucket, clip in clips[5 * number : 5 * number + 5]:
        writer.write(bucket, *clip)
  parts.finish(other, 3)
  assert encoded_clips.content(other) == encoded_clips.content(folder)


def test_what_was_left_out_is_listed(tmp_path):
  parts.begin(tmp_path / "a", {})
  for number in (1, 0):
    with parts.Writer(tmp_path / "a", number, encoded_clips.FACTS) as writer:
      writer.skip(f"é{number}.mp4", "it is short")
  index = parts.finish(tmp_path / "a", 2)
  assert index["records"] == 0
  lines = (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"file": "é0.mp4", "reason": "it is short"},
    {"file": "é1.mp4", "reason": "it is short"},
  ]
  config = {"source": "latents", "path": str(tmp_path / "a")}
  with pytest.raises(errors.UserError, match="too few clips"):
    pipeline.batches(config, batch_size=1, seed=0)


def test_a_folder_is_continued_with_the_same_settings_only(tmp_path):
  parts.begin(tmp_path / "a", encoded_clips.SETTINGS)
  parts.begin(tmp_path / "a", encoded_clips.SETTINGS)
  with pytest.raises(errors.UserError, match="frames was 8 and is 9"):
    parts.begin(tmp_path / "a", encoded_clips.SETTINGS | {"frames": 9})
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "mine.txt").write_text("")
  with pytest.raises(errors.UserError, match="is not empty and has no"):
    parts.begin(tmp_path / "b", encoded_clips.SETTINGS)


@pytest.mark.parametrize(
  ("name", "text", "word"),
  [
    (parts.PART, "4", "expected an object"),
    (parts.PART, "[" * 100_000, "nested too deep"),
    (parts.PART, '{"facts": {}, "buckets": {}}', "lacks skipped"),
    (
      parts.PART,
      '{"facts": {}, "buckets": {"a": {"records": 1}}, "skipped": []}',
      "its buckets",
    ),
    (
      parts.PART,
      '{"facts": {}, "buckets": {}, "skipped": {"a": 1}}',
      "its skipped",
    ),
    (parts.SETTINGS, "[]", "expected an object"),
    (parts.SETTINGS, "[" * 100_000, "nested too deep"),
  ],
)
def test_damaged_descriptions(folder, tmp_path, name, text, word):
  shutil.copytree(folder, tmp_path / "copy")
  path = min((tmp_path / "copy").rglob(name))
  path.write_text(text)
  with pytest.raises(errors.UserError, match=f"{name}.*{word}"):
    parts.finish(tmp_path / "copy", 3)


@pytest.mark.parametrize("where", ["gs://b/x", pathlib.Path("gs://b/x")])
def test_object_stores_are_refused(where):
  with pytest.raises(errors.UserError, match="can be locked, found gs://b/x"):
    parts.begin(where, encoded_clips.SETTINGS)


def test_clips_of_a_bucket_are_alike(tmp_path):
  parts.begin(tmp_path, encoded_clips.SETTINGS)
  for number, shape in enumerate([(2, 3, 4), (2, 4, 4)]):
    with parts.Writer(tmp_path, number, encoded_clips.FACTS) as writer:
      writer.write("24x48", *encoded_clips.clip(0, shape))
  with pytest.raises(errors.UserError, match="part-00001: 24x48 has"):
    parts.finish(tmp_path, 2)
  shutil.rmtree(tmp_path / "part-00001")
  with parts.Writer(tmp_path, 1, {"latent_scale": 2}) as writer:
    writer.write("24x48", *encoded_clips.clip(0))
  with pytest.raises(errors.UserError, match="expected .*0.5}, found .*2}"):
    parts.finish(tmp_path, 2)
  with pytest.raises(ValueError, match=r"24x48 has .*, found"):
    with parts.Writer(tmp_path, 2, encoded_clips.FACTS) as writer:
      writer.write("24x48", *encoded_clips.clip(0))
      writer.write("24x48", *encoded_clips.clip(0, (2, 4, 4)))
