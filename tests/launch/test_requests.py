"""Prompts, images and seeds, from flags and files."""

import json
import types

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import request_list, settings


def gather(prompts=(), file=None, seeds=("0",), image=None, last_image=None):
  return request_list.gather(prompts, file, seeds, image, last_image)


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
  PIL.Image.fromarray(pixels).save(path)
  return path


def test_prompts_times_seeds():
  found = gather(["a", "b"], seeds=["3", "1"])
  assert [(r.prompt, r.seed) for r in found] == [
    ("a", 3),
    ("a", 1),
    ("b", 3),
    ("b", 1),
  ]


def test_text_file(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("eins, zwei\n\n  二 \n", encoding="utf-8")
  assert [r.prompt for r in gather(["x"], str(path))] == [
    "x",
    "eins, zwei",
    "二",
  ]


def test_objects(tmp_path, photo):
  rows = [
    {"prompt": "a", "seed": 7, "negative_prompt": "n"},
    {"prompt": "b", "image": str(photo)},
  ]
  path = tmp_path / "prompts.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  first, *others = gather(
    file=str(path), seeds=["1", "2"], last_image=str(photo)
  )
  assert first == ("a", "n", None, str(photo), 7)
  assert [(r.image, r.seed) for r in others] == [
    (str(photo), 1),
    (str(photo), 2),
  ]


def test_names_say_what_and_which():
  request = gather(["A cat,\nwalks (slowly)! " + "far " * 30], seeds=["5"])[0]
  name = request.name(12)
  assert name.startswith("00012_a-cat-walks-slowly-far-")
  assert name.endswith("_seed5") and len(name) < 60
  assert gather(["???"])[0].name(0) == "00000_empty_seed0"
  assert gather(["二匹の猫"])[0].name(0) == "00000_二匹の猫_seed0"
  assert "/" not in gather(["../../x"])[0].name(0)


def test_images_are_read(photo):
  assert request_list.read_image(None) is None
  assert request_list.read_image(str(photo)).shape == (8, 9, 3)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool", "V2"])
def test_noise_is_floats(tmp_path, dtype):
  path = tmp_path / "noise.npy"
  np.save(path, np.zeros((1, 2, 3, 4), dtype))
  with pytest.raises(errors.UserError, match="must hold floats, found"):
    request_list.read_noise(str(path))
  np.save(path, np.zeros((1, 2, 3, 4), "float16"))
  assert request_list.read_noise(str(path)).shape == (1, 1, 2, 3, 4)


def test_an_archive_of_noise_is_closed(tmp_path, monkeypatch):
  path, opened = tmp_path / "noise.npz", []
  np.savez(path, np.zeros(3))
  load = np.load
  monkeypatch.setattr(
    np, "load", lambda *x, **y: opened.append(load(*x, **y)) or opened[-1]
  )
  with pytest.raises(errors.UserError, match="is an archive"):
    request_list.read_noise(str(path))
  assert opened[0].fid is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "holds no rows"),
    ("not json", "line 1 is not JSON"),
    ('{"prompt": "a"}\n{"text": "b"}', "line 2"),
    ('{"text": "b"}', "no column with the prompt"),
    ('{"prompt": null, "seed": 1}', "expected a .prompt., found .'seed'"),
    ('{"prompt": "\\ud800"}', "prompt holds half of a surrogate pair"),
    ('{"prompt": "a", "negative_prompt": "x\\udc00"}', "half of a surrogate"),
    ('{"prompt": "a", "prompt": "b"}', "line 1.*has 'prompt' twice"),
    ('{"prompt": "a", "seed": NaN}', "a seed is a whole number"),
    ('{"prompt": "a", "seed": ""}', "p.jsonl, line 1: a seed is a whole"),
    ('{"prompt": "a\\u0000"}', "prompt holds a NUL character"),
    ('{"prompt": "a", "seed": true}', "a seed is a whole number"),
    ("[" * 100000, "is nested too deep"),
    ('{"prompt": "a", "image": ""}', "name of an image is empty"),
    ('{"prompt": "a", "image": "' + "n" * 5000 + '"}', "nnn"),
    ('{"prompt": "a", "sed": 1}', "unknown keys sed"),
    ('{"prompt": "a", "seed": -1}', "a seed is a whole number"),
    ('{"prompt": "a", "seed": 4294967296}', "a seed is a whole number"),
    ('{"prompt": 3}', "prompt is no text: 3"),
    ('{"prompt": "a", "image": 5}', "image is no text: 5"),
    ('{"prompt": "a", "negative_prompt": []}', "negative_prompt is no text"),
    ('{"prompt": "a", "image": "none.png"}', "none.png"),
  ],
)
def test_bad_files(tmp_path, text, message):
  path = tmp_path / "p.jsonl"
  path.write_text(text)
  with pytest.raises(errors.UserError, match=message):
    gather(file=str(path))


ROWS = [{"prompt": "a red ring"}, {"prompt": "zwei, é"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
  ("name", "text", "encoding"),
  [
    ("p.jsonl", LINES, "utf-8-sig"),
    ("p.jsonl", LINES.replace("\n", "\r\n"), "utf-8"),
    ("P.JSONL", LINES, "utf-8"),
    ("p.jsonl", LINES, "utf-16"),
    ("p.json", json.dumps(ROWS, indent=1), "utf-8"),
    ("p.json", json.dumps([row["prompt"] for row in ROWS]), "utf-8"),
    ("p.csv", 'prompt\r\n"a red ring"\r\n"zwei, é"\r\n', "utf-8"),
    ("p.csv", "Prompt;seed\na red ring;\nzwei, é;\n", "utf-8-sig"),
    ("p.txt", "a red ring\r\nzwei, é\r\n", "utf-8-sig"),
    ("p.TXT", "a red ring\nzwei, é", "utf-16"),
  ],
)
def test_files_as_spreadsheets_and_editors_write_them(
  tmp_path, name, text, encoding
):
  path = tmp_path / name
  path.write_bytes(text.encode(encoding))
  found = [r.prompt for r in gather(file=str(path))]
  assert found == ["a red ring", "zwei, é"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_line_separators_stay_inside_prompts(tmp_path, name):
  prompt = "a ring\u2028grows\x85slowly"
  line = json.dumps({"prompt": prompt}, ensure_ascii=False)
  text = prompt if name == "p.txt" else line
  (tmp_path / name).write_text(text, encoding="utf-8")
  assert [r.prompt for r in gather(file=str(tmp_path / name))] == [prompt]


def test_what_is_empty_stays_and_what_is_null_is_not_there(tmp_path):
  path = tmp_path / "p.jsonl"
  rows = [
    {"prompt": "", "negative_prompt": "", "seed": 0},
    {"prompt": "b", "negative_prompt": None, "image": None, "seed": None},
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  with pytest.warns(UserWarning, match="1 of 2 rows have null or an empty"):
    found = gather(file=str(path), seeds=["3"])
  assert found == [("", "", None, None, 0), ("b", None, None, None, 3)]


def test_an_empty_negative_prompt_is_not_the_configs():
  found = [
    settings.negative_prompt(
      "Wan's own",
      types.SimpleNamespace(negative_prompt=config),
      types.SimpleNamespace(negative_prompt=own),
    )
    for own, config in (("", None), ("", "x"), (None, ""), (None, None))
  ]
  assert found == ["", "", "", "Wan's own"]


def test_prompts_of_another_kind_of_file(tmp_path):
  path = tmp_path / "p.yaml"
  path.write_text("- prompt: a ring")
  with pytest.raises(errors.UserError, match=r"kind .*\.txt, found p.yaml"):
    gather(file=str(path))
  with pytest.raises(errors.UserError, match="half of a surrogate pair"):
    gather(["a \udcff"])


def test_bad_flags(tmp_path):
  with pytest.raises(errors.UserError, match="nothing to do"):
    gather()
  with pytest.raises(errors.UserError, match="a seed is a whole number"):
    gather(["a"], seeds=["x"])
  with pytest.raises(errors.UserError, match="cannot read"):
    gather(file=str(tmp_path / "none.txt"))
  with pytest.raises(errors.UserError, match="is not an image"):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"no")
    gather(["a"], image=str(path))
