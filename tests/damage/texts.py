"""Captions and prompts."""

import json

from dcvideogen_jax.data import captions
from dcvideogen_jax.sample import request_list
from tests.damage import reading

_VIDEOS = ("a.mp4", "b/c.mp4", "d.mkv")
_ROWS = (
  {
    "file": "a.mp4",
    "captions": ["a cat", "ein Kätzchen, 猫"],
    "scores": [1, 2],
  },
  {"file": "b/c.mp4", "caption": "a dog, that runs", "score": 0.5},
  {"file": "d.mkv", "text": 'rain "and" snow', "score": 3},
)
_PROMPTS = (
  "a cat walks on grass",
  "ein Hund läuft",
  "一只猫",
  "rain, at night",
)


def _folder(directory):
  (directory / "b").mkdir()
  for name in _VIDEOS:
    (directory / name).touch()


def _json_table(directory):
  _folder(directory)
  lines = [json.dumps(row, ensure_ascii=False) for row in _ROWS]
  (directory / "table.jsonl").write_text("\n".join(lines) + "\n")


def _csv_table(directory):
  _folder(directory)
  (directory / "table.csv").write_text(
    "file,captions,score,scores\n"
    'a.mp4,"[""a cat"", ""ein Kätzchen, 猫""]",,"[1, 2]"\n'
    'b/c.mp4,"[""a dog, that runs""]",0.5,\n'
    'd.mkv,"[""rain""]",3,\n'
  )


def _beside(directory):
  _folder(directory)
  for name in _VIDEOS:
    path = (directory / name).with_suffix(".txt")
    path.write_text(f"What {name} shows.\n")


def _read_captions(table):
  def read(directory):
    found = captions.read(directory, table and directory / table)
    return {x.file: f"{x.captions} {x.scores}" for x in found}

  return read


def _lines(directory):
  (directory / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n")


def _objects(directory):
  rows = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(_PROMPTS)]
  rows[1]["negative_prompt"] = "blurred"
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def _read_prompts(name):
  def read(directory):
    found = request_list.gather([], str(directory / name), ["0"], None, None)
    # Names of files are made of them, and encoders read UTF-8.
    named = {x.name(i): f"{x}" for i, x in enumerate(found)}
    for request in found:
      f"{request.prompt}{request.negative_prompt}".encode()
    return named

  return read


# Any text is as right as another one, but a byte order mark is no text.
_ANY = (r"^(?!.*byte order)",)
INPUTS = (
  reading.Input(
    "captions .jsonl",
    "table.jsonl",
    "lines",
    _json_table,
    _read_captions("table.jsonl"),
    "all",
    _ANY,
  ),
  reading.Input(
    "captions .csv",
    "table.csv",
    "table",
    _csv_table,
    _read_captions("table.csv"),
    "all",
    _ANY,
  ),
  reading.Input(
    "captions .txt",
    "a.txt",
    "text",
    _beside,
    _read_captions(None),
    "all",
    _ANY,
    _ANY,
  ),
  reading.Input(
    "prompts .txt",
    "prompts.txt",
    "text",
    _lines,
    _read_prompts("prompts.txt"),
    "all",
    _ANY,
  ),
  reading.Input(
    "prompts .jsonl",
    "prompts.jsonl",
    "lines",
    _objects,
    _read_prompts("prompts.jsonl"),
    "all",
    _ANY,
  ),
)
