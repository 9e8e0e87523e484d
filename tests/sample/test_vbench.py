"""VBench's lists: names, seeds, images, what is left, and whole folders."""

import json
import types

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import errors
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import (
  results,
  sizes,
  vbench,
  vbench_folder,
  vbench_resume,
)

ROWS = [
  {"prompt_en": "a still ball", "dimension": ["temporal_flickering"]},
  {"prompt_en": "a ring by Hokusai.", "dimension": ["appearance_style"]},
  {"prompt_en": "two cats", "dimension": ["scene", "background_consistency"]},
  {"prompt_en": "a ring by Hokusai.", "dimension": ["imaging_quality"]},
]
PAIRS = [
  {
    "prompt_en": text,
    "dimension": ["i2v_background", "temporal_flickering"],
    "image_name": f"{name}.png",
  }
  for text, name in (("sea", "sea"), ("sea, camera static", "sea"))
]
MADE_WITH = {"model": "tiny", "steps": 2, "lora": ["a,1"]}


def write(tmp_path, rows, name="list.json"):
  path = tmp_path / name
  path.write_text(json.dumps(rows), encoding="utf-8")
  return str(path)


@pytest.fixture
def listed(tmp_path):
  with pytest.warns(UserWarning, match="1 of 4 rows have the prompt of anoth"):
    return vbench.read(write(tmp_path, ROWS))


def names_vbench_looks_for(rows, suffix=".mp4"):
  """Its own rule, for each row: the prompt and five numbers."""
  return {f"{x['prompt_en']}-{i}{suffix}" for x in rows for i in range(5)}


def test_names_are_those_that_vbench_looks_for(listed):
  videos = vbench.videos(listed)
  names = [f"{video.name()}.mp4" for video in videos]
  assert len({*names}) == len(names) == 25 + 5 + 5
  further = {f"a still ball-{k}.mp4" for k in range(5, 25)}
  assert {*names} == names_vbench_looks_for(ROWS) | further
  assert names == [name for p in listed.prompts for name in p.names()]


def test_a_repeated_prompt_is_that_of_its_later_row(listed):
  augmented = ["A", "B", "C", "D"]
  videos = vbench.videos(listed, augmented=augmented, rule="numbered")
  found = {(v.original, v.prompt, v.row, v.seed - v.sample) for v in videos}
  assert found == {
    ("a still ball", "A", 0, 0),
    ("two cats", "C", 2, 200_000),
    ("a ring by Hokusai.", "D", 3, 300_000),
  }
  ring = listed.prompts[-1]
  assert ring.dimensions == ("appearance_style", "imaging_quality")


def test_drawn_seeds_are_the_videos_own(tmp_path, listed):
  seeds = {v.name(): v.seed for v in vbench.videos(listed)}
  assert len({*seeds.values()}) == len(seeds)
  assert all(0 <= seed < 2**32 for seed in seeds.values())
  part = vbench.read(write(tmp_path, ROWS[2:3]))
  for video in vbench.videos(part):
    assert video.seed == seeds[video.name()]
  other = {v.name(): v.seed for v in vbench.videos(listed, base=1)}
  assert not {*other.values()} & {*seeds.values()}


def test_numbered_seeds_may_not_be_too_large(listed):
  with pytest.raises(errors.UserError, match="seeds would exceed 4294967295"):
    vbench.videos(listed, rule="numbered", base=2**32 - 300_000)


def test_dimensions_and_samples(tmp_path, listed):
  with pytest.warns(UserWarning):
    part = vbench.read(listed.path, ["scene", "imaging_quality"], samples=2)
  assert [(p.text, p.row, p.samples) for p in part.prompts] == [
    ("two cats", 2, 2),
    ("a ring by Hokusai.", 3, 2),
  ]
  assert part.rows == 4


@pytest.mark.parametrize(
  ("name", "samples"),
  [("all_dimension.txt", 5), ("temporal_flickering.txt", 25)],
)
def test_text_lists(tmp_path, name, samples):
  (tmp_path / name).write_bytes(b"a cat-3\r\n\r\n b \r\n")
  found = vbench.read(tmp_path / name).prompts
  assert [(p.text, p.samples) for p in found] == [
    ("a cat-3", samples),
    ("b", samples),
  ]


def test_images_and_their_crops(tmp_path):
  place = tmp_path / "data" / "crop" / "8-5"
  place.mkdir(parents=True)
  listed = vbench.read(write(tmp_path, PAIRS))
  with pytest.raises(errors.UserError, match="lacks 1 of 1 images.*sea.png"):
    vbench.find_images(str(tmp_path / "data"), "8-5", listed)
  PIL.Image.new("RGB", (16, 10)).save(place / "sea.png")
  for folder in ("data", "data/crop"):
    images = vbench.find_images(str(tmp_path / folder), "8-5", listed)
  videos = vbench.videos(listed, images=images)
  # The image suite has five videos per pair, whatever the dimension.
  assert len(videos) == 10
  assert {v.image for v in videos} == {str(place / "sea.png")}
  with pytest.raises(errors.UserError, match="no folder .*7-4"):
    vbench.find_images(str(tmp_path / "data"), "7-4", listed)
  with pytest.raises(errors.UserError, match="--vbench_images is needed"):
    vbench.videos(listed)
  (place / "sea.png").write_bytes(b"no image")
  with pytest.raises(errors.UserError, match="is not an image"):
    vbench.find_images(str(tmp_path / "data"), "8-5", listed)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([{"prompt_en": "a/b"}], r"row 1: VBench finds .* slash of 'a/b'"),
    ([{"prompt_en": "é" * 125}], "a name of 257 bytes.*--vbench_augmented"),
    ([{"prompt_en": 3}], "prompt_en is no text: 3"),
    ([{"prompt_en": "a", "dimension": [3]}], "dimension must be a list of"),
    ([{"prompt_en": "a", "image_name": 3}], "image_name is no text"),
    ([{"prompt": "a"}], "no column with the prompt"),
    ([*ROWS[:1], *PAIRS], "some rows have an image_name, others none"),
    ([], "holds no rows"),
  ],
)
def test_bad_lists(tmp_path, rows, message):
  path = write(tmp_path, rows)
  with pytest.raises(errors.UserError, match=message):
    vbench.read(path)


def test_the_longest_name_holds_its_settings(tmp_path):
  # 248 bytes, and "-0.json".
  (prompt,) = vbench.read(write(tmp_path, [{"prompt_en": "é" * 124}])).prompts
  assert len(prompt.names()[-1].encode()) == 254
  (tmp_path / prompt.names()[-1].replace(".mp4", ".json")).touch()


def test_other_dimensions_and_other_numbers_of_texts(tmp_path, listed):
  with (
    pytest.raises(errors.UserError, match="color: expected some of temporal"),
    pytest.warns(UserWarning),
  ):
    vbench.read(listed.path, ["color"])
  path = tmp_path / "texts.txt"
  path.write_text("A\nB\nC\n")
  message = "has 3 texts, expected one for each of the 4 rows"
  with pytest.raises(errors.UserError, match=message):
    vbench.read_augmented(path, listed)
  path.write_text("A\nB\nC\nD")
  assert vbench.read_augmented(path, listed) == ["A", "B", "C", "D"]


def make(folder, video, made_with=MADE_WITH, frames=4, height=16, seed=0):
  """Writes a video of noise as `dcvideogen sample` would."""
  random = np.random.default_rng(seed)
  pixels = random.integers(0, 256, (1, frames, height, 16, 3)).astype(np.uint8)
  size = sizes.Size(frames, height, 16)
  result = types.SimpleNamespace(
    settings=size._asdict(), size=size, chunks=lambda i: iter([pixels])
  )
  results.write(
    folder / video.name(),
    video,
    result,
    clock_lib.Clock(),
    settings={"vbench": vbench_resume.told(video, made_with)},
    folders=vbench.FOLDERS,
  )


@pytest.fixture
def few(tmp_path):
  return vbench.read(write(tmp_path, ROWS[:2]), samples=2)


def test_a_folder_of_videos_holds_nothing_else(tmp_path, few):
  video = vbench.videos(few)[0]
  (tmp_path / "out").mkdir()
  make(tmp_path / "out", video)
  found = {
    x.relative_to(tmp_path / "out").as_posix()
    for x in (tmp_path / "out").rglob("*")
    if x.is_file()
  }
  assert found == {"videos/a still ball-0.mp4", "settings/a still ball-0.json"}


def test_what_is_there_is_not_made_again(tmp_path, few):
  videos = vbench.videos(few)
  assert vbench_resume.remaining(tmp_path, videos, MADE_WITH) == videos
  make(tmp_path, videos[1])
  left = vbench_resume.remaining(tmp_path, videos, MADE_WITH)
  assert left == [videos[0], *videos[2:]]
  for other, message in (
    ({**MADE_WITH, "steps": 3}, "made with steps 2, now 3"),
    ({**MADE_WITH, "lora": []}, "made with lora"),
  ):
    with pytest.raises(errors.UserError, match=message):
      vbench_resume.remaining(tmp_path, videos, other)
  seeds = vbench.videos(few, rule="numbered")
  with pytest.raises(errors.UserError, match="made with seed .*, now 1"):
    vbench_resume.remaining(tmp_path, seeds, MADE_WITH)
  # Settings without a video are those of a run that was killed in between.
  (tmp_path / "videos" / f"{videos[1].name()}.mp4").rename(tmp_path / "x.mp4")
  assert vbench_resume.remaining(tmp_path, videos, MADE_WITH) == videos
  (tmp_path / "x.mp4").rename(tmp_path / "videos" / f"{videos[1].name()}.mp4")
  (tmp_path / "settings" / f"{videos[1].name()}.json").unlink()
  with pytest.raises(errors.UserError, match="has no settings in"):
    vbench_resume.remaining(tmp_path, videos, MADE_WITH)


def test_names_that_are_one_file(tmp_path, monkeypatch):
  listed = vbench.read(
    write(tmp_path, [{"prompt_en": x} for x in ("A cat", "a cat")])
  )
  videos = vbench.videos(listed)
  monkeypatch.setattr(vbench_resume, "_ignores_case", lambda folder: True)
  with pytest.raises(errors.UserError, match="'A cat' and 'a cat' for one"):
    vbench_resume.check_case(tmp_path, videos)
  vbench_resume.check_case(tmp_path, videos[:5])
  monkeypatch.undo()
  assert not [x for x in tmp_path.iterdir() if x.name != "list.json"]


def test_a_complete_folder(tmp_path, few):
  for i, video in enumerate(vbench.videos(few)):
    make(tmp_path, video, seed=i)
  for place in (tmp_path, tmp_path / "videos"):
    report = vbench_folder.check(place, few, every_frame=True)
    assert report["complete"], report
  assert report["size"] == "4 x 16 x 16, 16 fps"
  assert report["made_with"] == MADE_WITH
  assert report["dimensions"] == {
    "temporal_flickering": {"due": 2, "there": 2},
    "appearance_style": {"due": 2, "there": 2},
  }
  assert vbench_folder.check(tmp_path, few, (4, 16, 16))["complete"]
  json.dumps(report)


def damage(name, tmp_path, videos):
  """Makes a complete folder incomplete; the name that the report gives."""
  place, video = tmp_path / "videos", videos[-1]
  path = place / f"{video.name()}.mp4"
  if name == "missing":
    path.unlink()
  elif name == "extra":
    path = place / "notes.json"
    path.write_text("{}")
  elif name == "unreadable":
    path.write_bytes(path.read_bytes()[:-50])
  elif name == "wrong_size":
    path.unlink()
    make(tmp_path, video, height=32)
  elif name == "mixed":
    path.unlink()
    make(tmp_path, video, made_with={**MADE_WITH, "steps": 9})
  return path.name


@pytest.mark.parametrize("name", vbench_folder.PROBLEMS)
def test_what_is_wrong_is_named(tmp_path, few, name):
  videos = vbench.videos(few)
  for video in videos:
    make(tmp_path, video)
  found = damage(name, tmp_path, videos)
  report = vbench_folder.check(tmp_path, few)
  assert [x for x in vbench_folder.PROBLEMS if report[x]] == [name]
  assert [*report[name]] == [found]
  assert not report["complete"]
  (line,) = [x for x in vbench_folder.told(report) if found in x]
  assert line.startswith(f"1 {vbench_folder.PROBLEMS[name]}")


def test_a_shorter_video_shows_only_if_all_frames_are_decoded(
  tmp_path, few, monkeypatch
):
  for video in vbench.videos(few):
    make(tmp_path, video)
  frames = video_files.frames
  monkeypatch.setattr(
    vbench_folder.video_files, "frames", lambda x: iter([*frames(x)][:-1])
  )
  assert vbench_folder.check(tmp_path, few)["complete"] is True
  report = vbench_folder.check(tmp_path, few, every_frame=True)
  assert len(report["unreadable"]) == 4


def test_videos_of_another_program(tmp_path, few):
  """Without settings, most videos say which size is right."""
  for i, video in enumerate(vbench.videos(few)):
    make(tmp_path, video, frames=4 + (i == 2))
  report = vbench_folder.check(tmp_path / "videos", few, (5, 16, 16))
  assert len(report["wrong_size"]) == 3
  for path in (tmp_path / "settings").iterdir():
    path.unlink()
  report = vbench_folder.check(tmp_path / "videos", few)
  assert len(report["wrong_size"]) == 1 and report["made_with"] is None
  with pytest.raises(errors.UserError, match="there is no folder"):
    vbench_folder.check(tmp_path / "none", few)
