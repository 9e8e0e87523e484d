"""launch.sample end to end on the model that ships, as a user runs it."""

import json
import shutil
import signal
import time
from importlib.resources import files

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax.data import video
from tests.launch import launching
from tests.train import killing

SMALL = (
  "--config.height=40",
  "--config.width=56",
  "--config.frames=10",
  "--config.steps=2",
)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
  path = tmp_path_factory.mktemp("photo") / "photo.png"
  PIL.Image.fromarray(launching.clip(1, 50, 70)[0]).save(path)
  return path


def sample(programs, output, *flags):
  finished = programs.run(
    "launch.sample", "--model=tiny", f"--output={output}", *SMALL, *flags
  )
  assert finished.code == 0, finished.stderr
  assert not launching.complaints(finished.stderr)
  return finished


def read(path):
  return np.stack(list(video.read_frames(path)))


def test_text_to_video(programs, tmp_path):
  finished = sample(
    programs,
    tmp_path / "out",
    "--prompt=A red ball, rolling",
    "--prompt=a cat",
    "--seeds=3,4",
  )
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  expected = [
    f"{i:05d}_{slug}_seed{seed}{suffix}"
    for i, (slug, seed) in enumerate(
      (slug, seed)
      for slug in ("a-red-ball-rolling", "a-cat")
      for seed in (3, 4)
    )
    for suffix in (".json", ".mp4", ".png")
  ]
  assert names == expected
  assert "1 of 4: A red ball, rolling" in finished.stdout
  stem = tmp_path / "out" / "00001_a-red-ball-rolling_seed4"
  info = video.probe(f"{stem}.mp4")
  assert (info.frames, info.height, info.width, info.fps) == (10, 40, 56, 16)
  report = json.loads(stem.with_suffix(".json").read_text())
  assert report["settings"]["prompts"] == ["A red ball, rolling"]
  assert report["settings"]["seeds"] == [4]
  assert report["settings"]["steps"] == 2
  assert "transformer_t2v" in report["settings"]["files"]["transformer"]
  phases = {"load", "compile", "text", "denoise", "decode", "write"}
  assert phases <= report["seconds"].keys()
  assert report["memory"]["peak_rss_bytes"] > 10**8
  assert {"jax", "dcvideogen_jax", "device"} <= report["versions"].keys()
  assert PIL.Image.open(stem.with_suffix(".png")).width > 8 * 56
  first, second = (
    read(tmp_path / "out" / f"{name}.mp4")
    for name in ("00000_a-red-ball-rolling_seed3", stem.name)
  )
  assert np.abs(first.astype(int) - second).mean() > 1


@pytest.mark.parametrize(
  ("task", "config"), [("t2v", "tiny"), ("i2v", "tiny-i2v")]
)
def test_few_steps(programs, photo, tmp_path, task, config):
  """With the LoRA that the tiny model brings; the report tells it."""
  finished = programs.run(
    *("launch.sample", f"--config={config}", "--few", "--prompt=a cat"),
    *([f"--image={photo}"] if task == "i2v" else []),
    *("--frames=10", "--config.height=40", "--config.width=56"),
    f"--output={tmp_path / 'out'}",
  )
  assert finished.code == 0, finished.stderr
  assert "few=own: 4 evaluations, renoise, without guidance" in finished.stdout
  assert f"few_{task}: 117 tensors matched" in finished.stdout
  (path,) = (tmp_path / "out").glob("*.json")
  told = json.loads(path.read_text())["settings"]
  assert told["few"].startswith("few=own: 4 evaluations")
  assert (told["steps"], told["guidance_scale"]) == (4, 1.0)
  assert told["levels"] == [1.0, 0.9, 0.75, 0.5] and told["shift"] is None
  assert told["negative_prompt"] is None


def test_few_steps_of_a_stream(programs, tmp_path):
  """With a LoRA that says its chunk; the weights are those for whole clips."""
  own = files("dcvideogen_jax") / "assets" / "dcvideogen_tiny" / "few_t2v"
  lora = shutil.copytree(str(own), tmp_path / "lora")
  told = json.loads((lora / "few.json").read_text()) | {"chunk": 2}
  (lora / "few.json").write_text(json.dumps(told))
  flags = (
    *("launch.sample", "--stream", "--model=tiny", "--few", "--prompt=a cat"),
    *("--frames=12", "--config.height=40", "--config.width=56"),
    *(f"--lora={lora}", f"--output={tmp_path / 'out'}"),
  )
  finished = programs.run(*flags)
  assert finished.code == 0, finished.stderr
  line = "few=given: 4 evaluations for each chunk of 2 latent frames, renoise"
  assert line in finished.stdout
  assert "117 tensors matched" in finished.stdout
  (path,) = (tmp_path / "out").glob("*.json")
  settings = json.loads(path.read_text())["settings"]
  assert (settings["chunk"], settings["steps"]) == (2, 4)
  assert settings["levels"] == told["levels"]
  finished = programs.run(*flags, "--chunk=4")
  assert finished.code == 2 and "found --chunk=4" in finished.stderr


def test_image_to_video_and_its_repetition(programs, tmp_path, photo):
  flags = ("--prompt=it turns", f"--image={photo}", "--crf=0")
  videos = []
  for name, more in (
    ("one", ()),
    ("two", ("--one_program", "--text_encoder=once")),
    (
      "last",
      (
        f"--last_image={photo}",
        "--text_encoder=host",
        "--config.weights=int8",
      ),
    ),
  ):
    told = sample(programs, tmp_path / name, *flags, *more).stdout
    assert ("loading the image encoders of" in told) == (name == "two")
    (path,) = (tmp_path / name).glob("*.mp4")
    videos.append(read(path).astype(int))
  assert np.abs(videos[0] - videos[1]).max() <= 2
  assert np.abs(videos[0] - videos[2]).max() > 2
  report = json.loads(path.with_suffix(".json").read_text())
  assert report["settings"]["task"] == "i2v"
  assert report["settings"]["weights"] == "int8"
  assert "condition" in report["seconds"]


STREAM = (
  "--stream",
  "--chunk=2",
  "--window=1",
  "--config.height=40",
  "--config.width=56",
  "--config.steps=2",
)


def test_a_stream_and_its_continuation(programs, tmp_path):
  def stream(name, *flags):
    finished = programs.run(
      "launch.sample",
      "--model=tiny",
      f"--output={tmp_path / name}",
      "--prompt=a red ball",
      "--crf=0",
      *STREAM,
      *flags,
    )
    assert finished.code == 0, finished.stderr
    assert not launching.complaints(finished.stderr)
    (path,) = (tmp_path / name).glob("*.mp4")
    return (
      path,
      read(path).astype(int),
      json.loads(path.with_suffix(".json").read_text()),
    )

  flags = ("--frames=20", "--prompt_at=2:a cat", "--text_encoder=once")
  path, first, report = stream("one", *flags)
  assert first.shape == (20, 40, 56, 3)
  settings = report["settings"]
  assert settings["prompts"] == {"0": "a red ball", "2": "a cat"}
  assert (settings["window"], settings["chunk"]) == (1, 2)
  assert [x["frames"] for x in report["chunks"]] == [8, 16, 20]
  assert {"denoise", "decode"} <= report["seconds"].keys()
  names = {p.suffix for p in path.parent.iterdir()}
  assert names == {".mp4", ".json", ".png"}
  # Another prompt for the last chunk, which the others do not know of.
  _, other, _ = stream("two", "--frames=20")
  assert np.abs(first[:16] - other[:16]).max() <= 2
  assert np.abs(first[16:] - other[16:]).max() > 2
  # The last whole chunk of the 20 frames, then ten new frames.
  _, longer, report = stream("three", "--frames=10", f"--continue_from={path}")
  assert longer.shape == (18, 40, 56, 3)
  assert report["settings"]["given_frames"] == 8
  assert report["settings"]["continue_from"] == str(path)


def test_an_interrupted_stream_keeps_its_chunks(tmp_path):
  command = [
    *("launch.sample", "--model=tiny", "--prompt=a red ball", *STREAM),
    *("--frames=80000", "--config.steps=1", f"--output={tmp_path / 'out'}"),
  ]
  # What runs in the background ignores SIGINT, and so would its children.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = killing.start(command, tmp_path / "cache")
  signal.signal(signal.SIGINT, before)
  with process:
    for _ in range(1000):
      time.sleep(0.2)
      if [*tmp_path.glob("out/.new-*/*")]:
        break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    code, out, err = killing.finish(process)
  assert code == 130 and err == "error: interrupted\n", err
  assert "stopping after this chunk" in out
  names = {p.suffix for p in (tmp_path / "out").iterdir()}
  assert names == {".mp4", ".json", ".png"}
  (path,) = (tmp_path / "out").glob("*.mp4")
  frames = read(path)
  assert 0 < len(frames) < 80000 and len(frames) % 8 == 0
  assert f"{path}: {len(frames)} of 80000 frames" in out
  report = json.loads(path.with_suffix(".json").read_text())
  assert report["chunks"][-1]["frames"] == len(frames)


def test_image_to_video_without_an_image(programs, tmp_path):
  """A stream that goes on from a video has its first frame."""
  frames = launching.clip(9, 40, 56)
  path = launching.write_video(tmp_path / "clip.mp4", frames)
  finished = programs.run(
    "launch.sample",
    "--model=tiny",
    "--task=i2v",
    "--prompt=it goes on",
    f"--continue_from={path}",
    "--frames=8",
    f"--output={tmp_path / 'out'}",
    *STREAM,
  )
  assert finished.code == 0, finished.stderr
  (made,) = (tmp_path / "out").glob("*.mp4")
  assert video.probe(made).frames == 16


def test_given_noise_and_official_size(programs, tmp_path):
  noise = np.random.default_rng(0).normal(size=(2, 1, 1, 64))
  np.save(tmp_path / "noise.npy", noise)
  sample(
    programs,
    tmp_path / "out",
    "--prompt=x",
    "--config.size_rule=official",
    f"--noise={tmp_path / 'noise.npy'}",
  )
  (path,) = (tmp_path / "out").glob("*.mp4")
  info = video.probe(path)
  assert (info.frames, info.height, info.width) == (8, 32, 32)
