"""Prompts, images and seeds, from flags and files."""

import json

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors
from launch import _requests


def gather(prompts=(), file=None, seeds=("0",), image=None, last_image=None):
  return _requests.gather(prompts, file, seeds, image, last_image)


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
  assert _requests.read_image(None) is None
  assert _requests.read_image(str(photo)).shape == (8, 9, 3)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "holds no prompt"),
    ("not json", "line 1 is not JSON"),
    ('{"prompt": "a"}\n{"text": "b"}', "line 2"),
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


def test_bad_flags(tmp_path):
  with pytest.raises(errors.UserError, match="nothing to do"):
    gather()
  with pytest.raises(errors.UserError, match="a seed is a whole number"):
    gather(["a"], seeds=["x"])
  with pytest.raises(errors.UserError, match="cannot read the prompts"):
    gather(file=str(tmp_path / "none.txt"))
  with pytest.raises(errors.UserError, match="is not an image"):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"no")
    gather(["a"], image=str(path))
