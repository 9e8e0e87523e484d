"""Videos that are made, measured, and measured again from their folder."""

import json
import signal

import numpy as np
import PIL.Image
import pytest

from tests.launch import launching
from tests.train import killing

SMALL = ("--config.height=32", "--config.width=32", "--config.frames=8")
SMALL += ("--config.steps=2", "--crf=4")


@pytest.fixture(scope="module")
def made(programs, tmp_path_factory):
  """Scenes from their first frames, stopped after the first of three."""
  output = tmp_path_factory.mktemp("made") / "world.json"
  command = (
    *("launch.evaluate", "--what=generation", f"--output={output}"),
    *("--world_prompts=3", "--task=i2v", "--text_encoder=once", *SMALL),
  )
  process = killing.start(command, programs.cache)
  for line in process.stdout:
    if ".mp4: " in line:
      process.send_signal(signal.SIGTERM)
      break
  code, _, err = killing.finish(process)
  assert code == 143, err
  assert not output.exists()
  finished = programs.run(*command)
  assert finished.code == 0, finished.stderr
  return output, finished


def test_a_stopped_run_makes_and_measures_what_is_left(made):
  output, finished = made
  assert "3 videos; 0 are there" not in finished.stdout
  assert "scenes: 3 videos; " in finished.stdout
  # CLIP is there before the transformer, and no more beside it.
  assert "loading the image encoders of" in finished.stdout
  report = json.loads(output.read_text())
  assert report["videos"] == 3 and report["made"]["task"] == "i2v"
  rows = report["by_video"]
  assert [*report["facts"]] == ["colour", "shape", "motion", "all"]
  right = [row["facts"]["right"]["colour"] for row in rows]
  assert report["facts"]["colour"] == pytest.approx(np.mean(right))
  psnr = [row["first_frame"]["psnr"] for row in rows]
  assert report["first_frame"]["psnr"]["mean"] == pytest.approx(np.mean(psnr))
  assert not output.with_suffix(".clips.jsonl").exists()
  assert "| first frame, PSNR, dB |" in output.with_suffix(".md").read_text()
  picture = PIL.Image.open(output.with_suffix(".png"))
  assert picture.size == (3 * (4 * 32 + 2) - 2, 32)
  # The first frame that the model got.
  image = np.asarray(PIL.Image.open(rows[1]["image"]))
  assert image.shape == (32, 32, 3)
  assert rows[1]["drift"][0] < 30 and len(rows[1]["drift"]) == 8


def test_the_folder_gives_the_same_figures(programs, made, tmp_path):
  output, _ = made
  report = json.loads(output.read_text())
  folder = output.with_name("world_videos")
  again = tmp_path / "again.json"
  command = ("launch.evaluate", "--what=generation", f"--output={again}")
  for process in (1, 0):
    finished = programs.run(
      *command,
      *(f"--folder={folder}", "--world"),
      *("--processes=2", f"--process={process}"),
    )
    assert finished.code == 0, finished.stderr
    assert again.exists() == (process == 0)
  found = json.loads(again.read_text())
  for key in ("drift", "first_frame", "facts", "by_video"):
    assert found[key] == report[key]
  finished = programs.run(
    *command, f"--folder={folder}", f"--images={tmp_path}"
  )
  assert finished.code == 2 and "has no image 00000.png" in finished.stderr


def test_other_settings_than_the_videos_that_are_there(programs, made):
  output, _ = made
  finished = programs.run(
    *("launch.evaluate", "--what=generation", f"--output={output}"),
    *("--world_prompts=3", "--task=i2v", *SMALL, "--config.steps=3"),
  )
  assert finished.code == 2 and "made with steps 2, now 3" in finished.stderr


def test_lengths_that_fvd_cannot_compare(programs, tmp_path):
  for frames in (9, 12):
    path = tmp_path / "videos" / f"{frames}.mp4"
    path.parent.mkdir(exist_ok=True)
    launching.write_video(path, launching.clip(frames, 16, 16))
  command = (
    *("launch.evaluate", "--what=generation"),
    *(f"--output={tmp_path / 'x.json'}", f"--folder={tmp_path / 'videos'}"),
    f"--fvd_reference={tmp_path / 'videos'}",
  )
  finished = programs.run(*command)
  assert finished.code == 2
  assert "found 9 and 12 frames: give --fvd_window" in finished.stderr
  # Windows fit; the weights are missing then.
  finished = programs.run(
    *command, "--fvd_window=9", f"--fvd_weights={tmp_path / 'gone.pt'}"
  )
  assert finished.code == 2 and "gone.pt" in finished.stderr


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "nothing to do: give --prompt or --prompts"),
    (("--folder=a", "--prompt=b"), "--prompt does not go with --folder"),
    (("--folder=/gone",), "there is no folder /gone"),
    (("--prompt=a", "--images=b"), "--images goes with --folder only"),
    (
      ("--world_prompts=2", "--prompt=a"),
      "--prompt does not go with --world_prompts",
    ),
    (
      ("--world_prompts=2", "--seeds=1,2"),
      "--world_prompts takes one number in --seeds, found 1,2",
    ),
    (
      ("--world_prompts=1", "--processes=2", "--process=1"),
      "1 videos are too few for --processes=2",
    ),
    (
      ("--folder=a", "--fvd_window=9"),
      "--fvd_window goes with --fvd_reference",
    ),
    (("--folder=a", "--fvd_weights=b"), "--fvd_weights goes with"),
  ],
)
def test_bad_input(programs, tmp_path, flags, message):
  output = tmp_path / "new" / "report.json"
  finished = programs.run(
    "launch.evaluate", "--what=generation", f"--output={output}", *flags
  )
  assert finished.code == 2 and message in finished.stderr
  assert finished.stderr.count("\n") == 1
  assert not output.parent.exists()
