"""benchmarks.streams with the pipeline that ships."""

import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

import dcvideogen_jax

ASSETS = pathlib.Path(dcvideogen_jax.__file__).parent / "assets"
LORA = ASSETS / "dcvideogen_tiny" / "few_t2v"


def run(programs, output, *flags):
  return programs.run("benchmarks.streams", f"--output={output}", *flags)


def test_streams(programs, tmp_path):
  """Two prompts; clips that end after 8 and after 24 frames."""
  output = tmp_path / "report.json"
  finished = run(
    programs,
    output,
    *("--chunk=2", "--window=1", "--lengths=1,3", "--size=8,64,64"),
    *("--prompts=2", "--batch_size=2", "--steps=1"),
  )
  assert (finished.code, finished.stderr) == (0, "")
  report = json.loads(output.read_text())
  assert [*report["accuracy"]] == ["8", "24"]
  assert [*report["accuracy"]["24"]] == ["colour", "shape", "motion", "all"]
  readings = [video["read"]["24"] for video in report["videos"]]
  still = [x["motion"] == "still" for x in readings]
  assert report["accuracy"]["24"]["motion"] == np.mean(still)
  assert [x["frames"] for x in report["pace"]] == [8, 16, 24]
  seconds = [x["seconds"] for x in report["pace"]]
  assert seconds == sorted(seconds) and seconds[0] > 0
  assert report["settings"]["window"] == 1
  for name in ("report.png", "report.pace.png"):
    assert PIL.Image.open(tmp_path / name).width > 100
  assert "2 held-out prompts, frame 24: colour" in finished.stdout
  assert "s per frame in the second half, memory then" in finished.stdout


def test_streams_in_few_steps(programs, tmp_path):
  """The LoRA is that for whole clips, with chunks written beside it."""
  lora = tmp_path / "lora"
  shutil.copytree(LORA, lora)
  settled = {"levels": [1.0, 0.75], "solver": "renoise", "chunk": 2}
  (lora / "few.json").write_text(json.dumps(settled))
  output = tmp_path / "report.json"
  finished = run(
    programs,
    output,
    *(f"--few={lora}", "--lengths=1", "--size=16,64,64"),
    *("--prompts=2", "--batch_size=2", "--window=1"),
  )
  assert (finished.code, finished.stderr) == (0, "")
  assert "117 tensors matched" in finished.stdout
  settings = json.loads(output.read_text())["settings"]
  assert settings["chunk"] == 2 and settings["guidance_scale"] == 1
  assert settings["levels"] == settled["levels"]
  assert settings["solver"] == "renoise"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((f"--few={LORA}",), "was distilled for whole clips, not for streams"),
    ((f"--few={LORA.parent}",), "dcvideogen_tiny has no few.json"),
    ((f"--few={LORA}", "--steps=3"), "--steps is settled by --few"),
    (("--lengths=1,x",), "whole numbers from 1 on, found ['1', 'x']"),
    (("--size=16,64",), "found ['1', '4', '16'] and ['16', '64']"),
    (("--sink=1",), "a sink belongs to a window"),
    (
      ("--lengths=2", "--size=8,64,64"),
      "a clip that begins at frame 8 is not known",
    ),
  ],
)
def test_bad_input(programs, tmp_path, flags, message):
  output = tmp_path / "new" / "report.json"
  finished = run(programs, output, *flags)
  assert finished.code == 2 and message in finished.stderr
  assert finished.stderr.count("\n") == 1
  assert not output.parent.exists()
