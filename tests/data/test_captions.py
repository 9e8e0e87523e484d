"""Captions from tables and files beside the videos."""

import json
import re

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import captions


@pytest.fixture
def folder(tmp_path):
  """Empty files: reading captions opens no video."""
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
    (
      "t.txt",
      "",
      "of the kind .jsonl, .ndjson, .json, .csv, .tsv, found t.txt",
    ),
    ("t.jsonl", '{"file": "a.MOV"', "line 1 is not JSON"),
    ("t.jsonl", "\n[1]\n", "row 1: expected an object, found 1"),
    ("t.jsonl", '{"caption": "x"}', "no column with the file: expected one of"),
    ("t.jsonl", '{"file": 3, "caption": "x"}', "one of file, video"),
    ("t.jsonl", '{"file": "", "caption": "x"}', "one of file, video"),
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
      "line 2: some captions of a.MOV have scores and some have none",
    ),
    ("t.csv", "file,captions\na.MOV,[1\n", "line 2 is not JSON"),
    ("t.csv", "name,caption\na.MOV,x\n", "no column with the file"),
    ("t.csv", "file,words\na.MOV,x\n", "no column with the caption"),
    (
      "t.jsonl",
      '{"file": "a.MOV", "words": "x"}',
      "no column with the caption",
    ),
    ("t.csv", "a.MOV,a red ring\nb.mp4,x\n", "header with some of file, video"),
    ("t.csv", "file,caption\n", "holds no rows"),
    ("t.csv", "", "holds no rows"),
    (
      "t.csv",
      "file,caption\na.MOV,a ring, then two\n",
      "line 2: expected a cel",
    ),
    (
      "t.csv",
      'file,caption\na.MOV,"a ring\nb.mp4,x\n',
      "unexpected end of data",
    ),
    ("t.csv", "file,caption,Caption\na.MOV,x,y\n", "column caption twice"),
    ("t.jsonl", "[" * 100000, "is nested too deep"),
    ("t.jsonl", '{"file": "a.MOV", "text": ' + "[" * 100000, "nested too deep"),
    (
      "t.jsonl",
      '{"file": "a.MOV", "score": ' + "9" * 5000 + "}",
      "is not JSON",
    ),
    (
      "t.jsonl",
      '{"file": "a", "text": "x", "text": "y"}',
      "has 'text' twice",
    ),
    ("t.jsonl", '{"file": "a.MOV", "text": "\\ud800"}', "half of a surrogate"),
    ("t.jsonl", '{"file": "\\udc00.mp4", "text": "x"}', "half of a surrogate"),
    ("t.jsonl", '{"file": "a.MOV", "caption": 0}', "must be texts, found 0"),
    (
      "t.jsonl",
      '{"file": "a", "text": "x", "score": 1' + "0" * 400 + "}",
      "score",
    ),
    ("t.jsonl", '{"file": "no.mp4", "text": "x"}', "none of the files that"),
    (
      "t.jsonl",
      '{"file": "' + "n" * 5000 + '.mp4", "text": "x"}',
      "none of the",
    ),
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


_TEXTS = ("a red disc; then blue", "a bar\n\nturns", "white noise")
_NAMES = ("a.MOV", "b.mp4", "deep/c.webm")


def _pairs(file, caption, write=str):
  return [
    {file: write(name), caption: text}
    for name, text in zip(_NAMES, _TEXTS, strict=True)
  ]


def _cells(rows, delimiter=","):
  found = [delimiter.join(rows[0])]
  found += [delimiter.join(f'"{x}"' for x in row.values()) for row in rows]
  return "\r\n".join(found) + "\r\n"


@pytest.mark.parametrize(
  ("name", "text", "encoding"),
  [
    ("t.csv", _cells(_pairs("video", "prompt")), "utf-8"),
    ("t.csv", _cells(_pairs("file", "caption"), ";"), "utf-8-sig"),
    ("t.csv", _cells(_pairs("file_name", "text"), "\t"), "utf-16"),
    ("t.TSV", _cells(_pairs("File", "Caption"), "\t"), "utf-8"),
    ("t.JSONL", _lines(*_pairs("video_path", "caption")), "utf-8-sig"),
    ("t.ndjson", _lines(*_pairs("media_path", " Prompt ")), "utf-16"),
    ("t.json", json.dumps(_pairs("file", "caption"), indent=1), "utf-8"),
    ("t.jsonl", json.dumps(_pairs("file", "caption")), "utf-8"),
    ("t.jsonl", _lines(*_pairs("file", "text", "./{}".format)), "utf-8"),
    ("t.jsonl", _lines(*_pairs("file", "text", "videos/{}".format)), "utf-8"),
    (
      "t.jsonl",
      _lines(*_pairs("file", "text", lambda x: x.replace("/", "\\"))),
      "utf-8",
    ),
    (
      "t.csv",
      _cells(_pairs("file", "text", lambda x: x[:-4].rstrip("."))),
      "utf-8",
    ),
  ],
)
def test_tables_as_other_programs_write_them(folder, name, text, encoding):
  table = folder.parent / name
  table.write_bytes(text.encode(encoding))
  found = captions.read(folder, table)
  assert [(x.file, *x.captions) for x in found] == [
    *zip(_NAMES, _TEXTS, strict=True)
  ]


def test_absolute_names_and_a_relative_folder(folder, monkeypatch):
  monkeypatch.chdir(folder.parent)
  rows = _pairs("file", "caption", lambda name: str(folder / name))
  table = _table(folder, "t.jsonl", _lines(*rows))
  assert [x.captions for x in captions.read("videos", table)] == [
    (text,) for text in _TEXTS
  ]


def test_line_separators_stay_inside_texts(folder):
  text = "one\u2028two\x85three"
  table = _table(folder, "t.jsonl", _lines({"file": "a.MOV", "caption": text}))
  assert captions.read(folder, table)[0].captions == (text,)


def test_null_is_nothing_and_an_empty_text_is_one(folder):
  table = _table(
    folder,
    "t.jsonl",
    _lines(
      {"file": "a.MOV", "caption": None, "text": "from text", "score": None},
      {"file": "b.mp4", "caption": "", "text": None},
    ),
  )
  found = captions.read(folder, table)
  assert [x.captions for x in found] == [("from text",), (), ()]


def test_what_is_said_twice_counts_once_and_is_told(folder):
  rows = _pairs("file", "caption")
  table = _table(folder, "t.jsonl", _lines(*rows, rows[0]))
  with pytest.warns(UserWarning, match="1 rows say what an earlier row says"):
    assert captions.read(folder, table)[0].captions == _TEXTS[:1]


def test_which_of_two_columns_is_used_is_told(folder):
  rows = [row | {"text": "other"} for row in _pairs("file", "caption")]
  table = _table(folder, "t.jsonl", _lines(*rows))
  with pytest.warns(UserWarning, match="3 rows have caption, which is used"):
    assert captions.read(folder, table)[0].captions == _TEXTS[:1]


def test_texts_beside_videos_as_windows_editors_write_them(folder):
  (folder / "a.txt").write_bytes("a ring".encode("utf-8-sig"))
  (folder / "b.txt").write_bytes("a cross é".encode("utf-16"))
  (folder / "deep" / "c.txt").write_bytes("é".encode("latin-1"))
  with pytest.warns(
    UserWarning, match="1 captions cannot be .*c.txt is not UT"
  ):
    found = captions.read(folder)
  assert [x.captions for x in found] == [("a ring",), ("a cross é",), ()]
