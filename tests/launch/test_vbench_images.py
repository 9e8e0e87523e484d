"""A whole export of VBench's image suite: stopped, continued, and checked."""

import json
import signal

import PIL.Image
import pytest

from dcvideogen_jax.data import video
from dcvideogen_jax.tiny import scorer
from tests.train import killing

ROWS = [
  {
    "prompt_en": "a red ball on black, camera pans left",
    "dimension": ["camera_motion"],
    "image_name": "a red ball on black.png",
  },
  {
    "prompt_en": "a blue ring, moving",
    "dimension": ["i2v_subject", "subject_consistency"],
    "image_name": "a blue ring, moving.png",
  },
]
# 16 to 9 with the area of the config.
SIZE = 24, 42


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
  """The list and the crops, in the ratio that is asked for and in another."""
  root = tmp_path_factory.mktemp("suite")
  (root / "list.json").write_text(json.dumps(ROWS))
  for ratio, size in (("16-9", (72, 128)), ("1-1", (96, 96))):
    folder = root / "data" / "crop" / ratio
    folder.mkdir(parents=True)
    for i, row in enumerate(ROWS):
      crop = PIL.Image.fromarray(scorer.questions(2)[i].image(*size))
      crop.save(folder / row["image_name"])
  return root


def test_the_image_suite(programs, suite, tmp_path):
  output = tmp_path / "out"
  listed = f"--vbench={suite / 'list.json'}", "--vbench_samples=2"
  command = (
    *("launch.sample", f"--output={output}", "--config=tiny-i2v", *listed),
    *(f"--vbench_images={suite / 'data'}", "--vbench_ratio=16-9"),
    *("--config.steps=2", "--config.frames=8", "--config.area=1024"),
  )
  process = killing.start(command, programs.cache)
  for line in process.stdout:
    if ".mp4: " in line:
      process.send_signal(signal.SIGTERM)
      break
  code, _, err = killing.finish(process)
  assert code == 143, err
  names = [f"{row['prompt_en']}-{k}" for row in ROWS for k in range(2)]
  stopped = {x.stem for x in (output / "videos").iterdir()}
  assert stopped and stopped < {*names}
  report = tmp_path / "report.json"
  check = (
    *("launch.evaluate", "--what=vbench-folder", f"--folder={output}"),
    *(f"--output={report}", *listed),
  )
  finished = programs.run(*check)
  assert finished.code == 2
  assert f"not complete: {4 - len(stopped)} missing" in finished.stderr
  before = {x: x.stat().st_mtime_ns for x in output.rglob("*.mp4")}
  finished = programs.run(*command)
  assert finished.code == 0, finished.stderr
  told = f"4 videos; {len(stopped)} are there, {4 - len(stopped)} to make"
  assert told in finished.stdout
  assert all(x.stat().st_mtime_ns == time for x, time in before.items())
  finished = programs.run(*check, "--every_frame")
  assert finished.code == 0, finished.stderr
  assert "4 of 4 videos, 8 x 24 x 42, 16 fps" in finished.stdout
  assert "  i2v_subject: 2 of 2\n" in finished.stdout
  for i, name in enumerate(names):
    settings = json.loads((output / "settings" / f"{name}.json").read_text())
    settings = settings["settings"]
    row = ROWS[i // 2]
    path = suite / "data" / "crop" / "16-9" / row["image_name"]
    assert settings["image"] == str(path)
    assert settings["vbench"]["image"] == row["image_name"]
    assert settings["vbench"]["made_with"]["ratio"] == "16-9"
    first = next(video.read_frames(output / "videos" / f"{name}.mp4"))
    assert first.shape == (*SIZE, 3)
