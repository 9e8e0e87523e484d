"""launch.evaluate on clips of a small autoencoder, and on a whole model."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from dcvideogen_jax.convert import engine
from dcvideogen_jax.convert import lpips as table
from dcvideogen_jax.data import records
from dcvideogen_jax.models import lpips
from tests import random_weights
from tests.launch import launching

# What the report adds to the facts about the clips.
SET_LATER = ("dtype", "ground truth")


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


def test_videos_by_the_official_crop_and_several_models(
  programs, model, tmp_path
):
  """Stopped within the second model, and continued."""
  other, *_ = launching.save_model(tmp_path / "other", chunk_frames=4)
  (tmp_path / "videos").mkdir()
  for i in range(3):
    launching.write_video(
      tmp_path / "videos" / f"{i}.mp4", launching.clip(12, 50, 40, seed=i)
    )
  flags = (
    f"--model={model[0]}",
    f"--model={other}",
    f"--videos={tmp_path / 'videos'}",
    "--frames=8",
    "--size=16",
  )
  finished, whole = evaluate(programs, tmp_path / "report.json", *flags)
  found = whole["models"][str(other)]
  assert found["shape"] == [8, 16, 16, 3] and found["frames"] == 24
  assert len(found["psnr_by_frame"]) == 8 and len(found["psnr_by_clip"]) == 3
  assert found["psnr"] == pytest.approx(np.mean(found["psnr_by_frame"]))
  assert found["ssim"] == pytest.approx(np.mean(found["ssim_by_clip"]))
  assert found["psnr"] != whole["psnr"]
  assert not (tmp_path / "report.clips.jsonl").exists()
  table = (tmp_path / "report.md").read_text()
  assert f"| {other} | {found['psnr']:.4f} | " in table
  assert "8 in the centre" in table and "16 x 16, official crop" in table
  assert PIL.Image.open(tmp_path / "report.png").width > 3 * 300
  # What a stopped run leaves, with a line that it was writing.
  names = [str(tmp_path / "videos" / f"{i}.mp4") for i in range(3)]
  settings = {
    "about": {k: v for k, v in whole["about"].items() if k not in SET_LATER},
    "names": names,
    "config": None,
    "dtype": "float32",
    "ground_truth": "float32",
  }
  rows = [
    {"model": str(model[0]), "clip": name, "shape": [8, 16, 16, 3]}
    | {"psnr": [30.0] * 8, "ssim": [0.5] * 8}
    for name in names
  ]
  lines = [json.dumps({"settings": settings}, sort_keys=True)]
  lines += [json.dumps(row) for row in rows]
  (tmp_path / "report.clips.jsonl").write_text("\n".join(lines) + '\n{"mod')
  finished, resumed = evaluate(programs, tmp_path / "report.json", *flags)
  assert resumed["psnr"] == 30 and resumed["ssim"] == 0.5
  assert resumed["models"][str(other)] == found
  (tmp_path / "report.clips.jsonl").write_text(lines[0] + "\n")
  finished = programs.run(
    "launch.evaluate",
    f"--output={tmp_path / 'report.json'}",
    *flags,
    "--ground_truth=bfloat16",
  )
  assert finished.code == 2 and "with other settings" in finished.stderr


def test_lpips_with_given_weights(programs, model, tmp_path):
  records.write_shards([launching.clip(2, 32, 40)], tmp_path / "clips")
  weights = tmp_path / "alex.safetensors"
  module = lpips.LPIPS("alex")
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  params = random_weights.of(module, image, image)["params"]
  rules = table.layouts("alex")["lpips"]
  tensors = engine.torch_tensors(rules, jax.tree.map(abs, params))
  safetensors.numpy.save_file(
    {k: x.read() for k, x in tensors.items()}, weights
  )
  flags = f"--model={model[0]}", f"--clips={tmp_path / 'clips'}"
  output = tmp_path / "report.json"
  finished, report = evaluate(
    programs, output, *flags, "--lpips=alex", f"--lpips_weights={weights}"
  )
  assert report["lpips"] > 0 and len(report["lpips_by_frame"]) == 2
  assert f"LPIPS {report['lpips']:.4f}" in finished.stdout
  assert "Fetching" not in finished.stdout
  told = output.with_suffix(".md").read_text().splitlines()[0]
  assert f"clips 1, frames 2, size 32 x 40, LPIPS AlexNet of {weights}" in told
  missing = f"--fvd_weights={tmp_path / 'gone.pt'}"
  finished = programs.run(
    "launch.evaluate", f"--output={output}", *flags, "--fvd", missing
  )
  assert finished.code == 2 and "gone.pt" in finished.stderr


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
    (("--clips=a", "--videos=b"), "--videos, and not both"),
    (("--clips=a", "--frames=8"), "--frames goes with --videos only"),
    (
      ("--videos=a", "--model=b", "--model=c", "--config=d"),
      "--config goes with a single --model only",
    ),
    (("--clips=a", "--lpips_weights=b"), "--lpips_weights goes with --lpips="),
    (("--clips=a", "--fvd_weights=b"), "--fvd_weights goes with --fvd only"),
    (("--videos=/gone",), "there is no folder or list /gone"),
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
