"""launch.evaluate on clips of a small autoencoder, and on a whole model."""

import json

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax.data import records
from tests.launch import launching


def evaluate(programs, output, *flags):
  finished = programs.run("launch.evaluate", f"--output={output}", *flags)
  assert finished.code == 0, finished.stderr
  return finished, json.loads(output.read_text())


def test_reconstructions(programs, model, tmp_path):
  clips = [launching.clip(8, 12, 16), launching.clip(8, 12, 16)[::-1]]
  records.write_shards(clips, tmp_path / "clips")
  finished, report = evaluate(
    programs,
    tmp_path / "report.json",
    f"--model={model[0]}",
    f"--clips={tmp_path / 'clips'}",
  )
  assert report["clips"] == 2 and report["shape"] == [8, 12, 16, 3]
  assert report["psnr"] == pytest.approx(np.mean(report["psnr_by_clip"]))
  assert f"PSNR {report['psnr']:.2f} dB" in finished.stdout


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_held_out_prompts(programs, tmp_path, task):
  """Three prompts in batches of two, with the model that ships."""
  finished, report = evaluate(
    programs,
    tmp_path / "report.json",
    "--what=semantic",
    "--model=tiny",
    f"--task={task}",
    *("--prompts=3", "--batch_size=2", "--steps=2", "--size=8,64,64"),
  )
  assert finished.stderr == ""
  right = [video["right"] for video in report["videos"]]
  assert report["accuracy"]["all"] == pytest.approx(np.mean(right))
  assert [*report["accuracy"]] == ["colour", "shape", "motion", "all"]
  assert len({video["prompt"] for video in report["videos"]}) == 3
  assert report["tokens_per_video"] == 2 * 2 * 2
  assert min(report["seconds_per_video"].values()) > 0
  assert report["settings"]["steps"] == 2
  picture = np.asarray(PIL.Image.open(tmp_path / "report.png"))
  assert picture.shape == (64, 3 * (4 * 64 + 2) - 2, 3)
  assert "3 held-out prompts: colour " in finished.stdout
  assert "per video: 8 tokens, denoise " in finished.stdout


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "--clips must have a value"),
    (("--what=semantic", "--size=16,64"), "--size must be frames,height,width"),
    (("--what=semantic", "--size=a,b,c"), "found a,b,c"),
    (("--what=semantic", "--model=/gone"), "there is no model /gone"),
    (("--at_end",), "Unknown command line flag 'at_end'"),
    (("--what=semantic", "--clips=c"), "Unknown command line flag 'clips'"),
    (
      ("--what=else",),
      "--what must be reconstruction, semantic or vbench-folder, found else",
    ),
  ],
)
def test_bad_input(programs, tmp_path, flags, message):
  output = tmp_path / "new" / "report.json"
  finished = programs.run("launch.evaluate", f"--output={output}", *flags)
  assert finished.code == 2 and message in finished.stderr
  assert finished.stderr.count("\n") == 1
  assert not output.parent.exists()


def test_an_output_that_is_a_folder_is_told_before_any_work(programs, tmp_path):
  finished = programs.run(
    "launch.evaluate", f"--output={tmp_path}", "--clips=nowhere"
  )
  assert finished.code == 2
  assert f"--output={tmp_path} is a directory" in finished.stderr
