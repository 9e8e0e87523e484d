"""Videos are probed once, in parallel, and the results are cached."""

import json
import os

import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import probing, video


@pytest.fixture
def looked(tmp_path, monkeypatch):
  """A folder of three videos and a damaged one, and the names as probed."""
  monkeypatch.setattr(
    probing, "directory", lambda: tmp_path / "cache" / "videos"
  )
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(3):
    recordings.write(folder / f"{i}.mp4", recordings.clip(4 + i))
  (folder / "broken.mp4").write_text("no video")
  names, real = [], video.probe

  def probe(path):
    names.append(path.name)
    return real(path)

  monkeypatch.setattr(video, "probe", probe)
  return folder, names


NAMES = ["0.mp4", "1.mp4", "2.mp4", "broken.mp4", "gone.mp4"]


def test_what_was_seen_is_kept_until_a_file_changes(looked):
  folder, seen = looked
  first = probing.probe(folder, NAMES)
  assert sorted(seen) == NAMES and list(first) == NAMES
  assert [first[name].frames for name in NAMES[:3]] == [4, 5, 6]
  for name in NAMES[3:]:
    assert isinstance(first[name], errors.UserError)
  seen.clear()
  again = probing.probe(folder, NAMES)
  # Files that could not be read are probed again.
  assert sorted(seen) == ["broken.mp4", "gone.mp4"]
  assert [again[x] for x in NAMES[:3]] == [first[x] for x in NAMES[:3]]
  recordings.write(folder / "1.mp4", recordings.clip(9))
  os.utime(folder / "2.mp4", ns=(1, 1))
  seen.clear()
  assert probing.probe(folder, NAMES[:3])["1.mp4"].frames == 9
  assert sorted(seen) == ["1.mp4", "2.mp4"]


def test_other_code_and_damage_look_anew(looked, tmp_path):
  folder, seen = looked
  probing.probe(folder, NAMES[:3])
  (index,) = (tmp_path / "cache" / "videos").iterdir()
  content = json.loads(index.read_text())
  other = content | {"reader": "other code"}
  rows = content | {"rows": {"0.mp4": 3}}
  fields = {x: [row[0], {}] for x, row in content["rows"].items()}
  for bad in (json.dumps(other), json.dumps(rows), "[", "[" * 100000):
    index.write_text(bad)
    seen.clear()
    probing.probe(folder, NAMES[:3])
    assert len(seen) == 3
  index.write_text(json.dumps(content | {"rows": fields}))
  assert probing.probe(folder, NAMES[:1])["0.mp4"].frames == 4


def test_a_cache_that_cannot_be_written_is_no_error(looked, tmp_path):
  folder, _ = looked
  (tmp_path / "cache").write_text("a file")
  assert probing.probe(folder, NAMES[:1])["0.mp4"].frames == 4


@pytest.mark.parametrize(
  ("change", "same"),
  [
    (("a comment", "another"), True),
    (("A docstring.", "Prose."), True),
    (("  return (x + 1)", "  return x + 1"), True),
    (("x + 1", "x + 2"), False),
    (("def f", "def g"), False),
  ],
)
def test_only_other_statements_look_anew(change, same):
  """Comments, docstrings and layout do not count."""
  source = 'def f(x):\n  """A docstring."""\n  return (x + 1)  # a comment\n'
  old, new = (
    probing._statements(x.encode()) for x in (source, source.replace(*change))
  )
  assert source != source.replace(*change) and (old == new) == same
