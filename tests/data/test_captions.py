"""Captions from tables and files beside the videos."""

import json
import re

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import captions


@pytest.fixture
def folder(tmp_path):
  """Names only: nothing is opened."""
  path = tmp_path / "videos"
  (path / "deep").mkdir(parents=True)
  (path / ".hidden").mkdir()
  for name in ("b.mp4", "a.MOV", "deep/c.webm", "notes.md", ".hidden/d.mp4"):
    (path / name).write_bytes(b"")
  return path


def _table(folder, name, text):
  path = folder.parent / name
  path.write_text(text, encoding="utf-8")
  return path


def _lines(*rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_texts_beside_videos(folder):
  (folder / "a.txt").write_text(" two\nlines é \n", encoding="utf-8")
  (folder / "deep" / "c.txt").write_text("  \n")
  assert captions.read(folder) == [
    ("a.MOV", ("two\nlines é",), None),
    ("b.mp4", (), None),
    ("deep/c.webm", (), None),
  ]


def test_json_lines(folder):
  table = _table(
    folder,
    "t.jsonl",
    "\ufeff"
    + _lines(
      {"file": "b.mp4", "captions": ["one", " two "], "scores": [0.2, 1]},
      {"video": str(folder / "deep/c.webm"), "text": "slow, 慢"},
      {"path": "b.mp4", "caption": "three", "score": 0.5},
      {"file_name": "gone.mp4", "caption": "not there"},
    )
    + "\n",
  )
  assert captions.read(folder, table) == [
    ("a.MOV", (), None),
    ("b.mp4", ("one", "two", "three"), (0.2, 1.0, 0.5)),
    ("deep/c.webm", ("slow, 慢",), None),
    ("gone.mp4", ("not there",), None),
  ]


def test_csv(folder):
  table = _table(
    folder,
    "t.csv",
    "video,caption,score,captions\n"
    'a.MOV,"with, comma\nand line",0.5,\n'
    "a.MOV,second,0.25,\n"
    'b.mp4,,,"[""x"", ""y""]"\n'
    "deep/c.webm,,,\n",
  )
  assert captions.read(folder, table) == [
    ("a.MOV", ("with, comma\nand line", "second"), (0.5, 0.25)),
    ("b.mp4", ("x", "y"), None),
    ("deep/c.webm", (), None),
  ]


def test_empty_captions_go_with_their_scores(folder):
  table = _table(
    folder,
    "t.jsonl",
    _lines(
      {"file": "a.MOV", "captions": ["", "x", " "], "scores": [1, 2, 3]},
      {"file": "b.mp4", "captions": [""], "scores": [1]},
    ),
  )
  found = captions.read(folder, table)
  assert found[:2] == [("a.MOV", ("x",), (2.0,)), ("b.mp4", (), None)]


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("t.txt", "", ".jsonl or .csv file, found t.txt"),
    ("t.jsonl", '{"file": "a.MOV"', "line 1 is not JSON"),
    ("t.jsonl", "\n[1]\n", "line 2: expected an object, found '[1]'"),
    ("t.jsonl", '{"caption": "x"}', "under one of file, video"),
    ("t.jsonl", '{"file": 3, "caption": "x"}', "under one of file, video"),
    ("t.jsonl", '{"file": "a", "caption": 3}', "must be texts, found 3"),
    ("t.jsonl", '{"file": "a", "captions": [1]}', "must be texts, found [1]"),
    (
      "t.jsonl",
      '{"file": "a", "caption": "x", "captions": ["y"]}',
      "both one caption and captions",
    ),
    (
      "t.jsonl",
      '{"file": "a", "captions": ["x", "y"], "scores": [1]}',
      "expected 2 scores of 0 or more, one for each caption, found [1]",
    ),
    ("t.jsonl", '{"file": "a", "caption": "x", "score": -1}', "found [-1]"),
    ("t.jsonl", '{"file": "a", "caption": "x", "score": NaN}', "found [nan]"),
    ("t.jsonl", '{"file": "a", "caption": "x", "score": true}', "found True"),
    (
      "t.jsonl",
      '{"file": "a", "text": "x", "score": 1}\n{"file": "a", "text": "y"}',
      "line 2: some captions of a have scores and some have none",
    ),
    ("t.csv", "file,captions\na.MOV,[1\n", "line 2 is not JSON"),
    ("t.csv", "name,caption\na.MOV,x\n", "under one of file, video"),
  ],
)
def test_what_is_wrong_with_a_table_is_told(folder, name, text, words):
  table = _table(folder, name, text)
  with pytest.raises(errors.UserError, match=re.escape(words)):
    captions.read(folder, table)


def test_missing_tables_and_folders(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  for path, table, words in (
    (tmp_path / "nowhere", None, "is not a folder of videos"),
    (tmp_path / "empty", None, "has no .mp4, .mov"),
    (folder, tmp_path / "no.csv", "cannot read"),
  ):
    with pytest.raises(errors.UserError, match=words):
      captions.read(path, table)
