"""Records that processes share."""

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.eval import measurements

CLIPS = ["a", "b", "c", "d", "e"]


def start(path, process=0, processes=1, settings=None):
  share = measurements.Share(process, processes)
  return measurements.Record(path, settings or {"x": 1}, share)


def measure(record, count=None):
  """Measures some of what is left, and returns it."""
  left = record.left("m", CLIPS)[:count]
  for i in left:
    record.add({"model": "m", "clip": CLIPS[i], "value": i})
  return left


def test_processes_share_the_clips(tmp_path):
  """Process 1 is stopped; a process alone takes what is left."""
  path = tmp_path / "report[1].clips.jsonl"
  first, second = start(path, 0, 2), start(path, 1, 2)
  assert measure(first) == [0, 2, 4]
  assert not first.has_all("m", CLIPS)
  assert measure(second, 1) == [1]
  first.look()
  assert first.rows["m", "b"]["value"] == 1
  assert not first.has_all("m", CLIPS)
  alone = start(path)
  assert measure(alone) == [3] and alone.has_all("m", CLIPS)
  assert not alone.has_all(None, CLIPS)
  first.look()
  assert first.has_all("m", CLIPS)
  assert {k: v["value"] for k, v in first.rows.items()} == {
    ("m", name): i for i, name in enumerate(CLIPS)
  }
  other = path.with_name("report[1].clips.txt")
  other.write_text("")
  alone.remove()
  assert [*tmp_path.iterdir()] == [other]
  first.look()  # Files that are gone have no rows.


def test_a_line_that_was_being_written_does_not_count(tmp_path):
  path = tmp_path / "x.jsonl"
  measure(start(path, 0, 2), 2)
  part = tmp_path / "x.0-of-2.jsonl"
  part.write_text(part.read_text()[:-3])
  assert start(path, 1, 2).left("m", CLIPS) == [1, 3]
  assert measure(start(path, 0, 2)) == [2, 4]
  assert start(path).left("m", CLIPS) == [1, 3]


def test_a_share_of_other_settings_is_refused(tmp_path):
  path = tmp_path / "x.jsonl"
  measure(start(path, 1, 3))
  with pytest.raises(errors.UserError, match="1-of-3.jsonl is of a run with"):
    start(path, 0, 3, {"x": 2})
