"""launch.evaluate on clips of a small autoencoder, and on a whole model."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from dcvideogen_jax import convert
from dcvideogen_jax.convert import engine
from dcvideogen_jax.convert import lpips as table
from dcvideogen_jax.data import records
from dcvideogen_jax.models import lpips, wan_vae
from tests import random_weights
from tests.data import data_sets
from tests.launch import launching

# What the report adds to the facts about the clips.
SET_LATER = ("dtype", "ground truth")
WAN = {
  "latent_channels": 4,
  "base_width": 4,
  "multipliers": (1, 2, 2),
  "blocks": 1,
  "temporal": (True, True),
  "mean": (0, 0, 0, 0),
  "std": (1, 1, 1, 1),
}


def evaluate(programs, output, *flags):
  finished = programs.run("launch.evaluate", f"--output={output}", *flags)
  assert finished.code == 0, finished.stderr
  return finished, json.loads(output.read_text())


def test_reconstructions(programs, model, tmp_path):
  clips = [launching.clip(8, 12, 16), launching.clip(8, 12, 16)[::-1]]
  records.write_shards(clips, tmp_path / "clips")
  launching.save_decoder(tmp_path / "fast")
  other = f"{model[0]},decoder={tmp_path / 'fast'}"
  finished, report = evaluate(
    programs,
    tmp_path / "report.json",
    f"--model={model[0]}",
    f"--model={other}",
    f"--clips={tmp_path / 'clips'}",
  )
  assert report["clips"] == 2 and report["shape"] == [8, 12, 16, 3]
  assert report["psnr"] == pytest.approx(np.mean(report["psnr_by_clip"]))
  assert f"PSNR {report['psnr']:.2f} dB" in finished.stdout
  found = report["models"][other]
  assert found["psnr"] != report["psnr"]
  assert f"{other}: 2 clips of 8 frames: PSNR {found['psnr']:.2f}" in (
    finished.stdout
  )


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
  assert PIL.Image.open(tmp_path / "report.curves.png").width > 1000
  # What a stopped run leaves, with a line that it was writing.
  names = [str(tmp_path / "videos" / f"{i}.mp4") for i in range(3)]
  settings = {
    "about": {k: v for k, v in whole["about"].items() if k not in SET_LATER},
    "names": names,
    "config": None,
    "dtype": "float32",
    "ground_truth": "float32",
    "streamed": False,
    "windows": True,
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


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
  """Three videos of 12 frames, written by TFDS."""
  folder = tmp_path_factory.mktemp("tfds")
  rows = []
  for i in range(3):
    path = folder / f"{i}.mp4"
    launching.write_video(path, launching.clip(12, 50, 40, seed=i))
    rows.append({"video": path.read_bytes(), "captions": [], "scores": []})
  return data_sets.write(folder, rows)


def test_processes_share_the_clips_of_a_data_set(
  programs, model, tmp_path, data_set
):
  """Two processes and Wan's autoencoder; then one process, piece by piece."""
  module = wan_vae.build(WAN)
  convert.save(tmp_path / "wan", "wan_vae", module, shaped(module))
  flags = (
    *("--what=reconstruction", f"--model={model[0]}"),
    *(f"--wan_vae={tmp_path / 'wan'}", "--tfds=tiny_clips"),
    *(f"--data_dir={data_set}", "--split=train", "--frames=8", "--size=16"),
  )
  output = tmp_path / "report.json"
  for process in (1, 0):
    assert not output.exists()
    finished = programs.run(
      "launch.evaluate",
      f"--output={output}",
      *flags,
      *("--processes=2", f"--process={process}"),
    )
    assert finished.code == 0, finished.stderr
    waiting = "the last of the processes to finish writes the report"
    assert (waiting in finished.stdout) == (process == 1)
  assert not [*tmp_path.glob("*.jsonl")]
  shared = json.loads(output.read_text())
  assert "tiny_clips" in shared["about"]["set"]
  _, alone = evaluate(programs, tmp_path / "alone.json", *flags, "--streamed")
  assert not (tmp_path / "alone.png").exists()
  for label in (str(model[0]), str(tmp_path / "wan")):
    assert alone["models"][label]["shape"] == [8, 16, 16, 3]
    assert alone["models"][label]["psnr_by_clip"] == pytest.approx(
      shared["models"][label]["psnr_by_clip"], abs=0.01
    )


def shaped(module):
  video = jax.ShapeDtypeStruct((1, 1, 4, 4, 3), np.float32)
  return random_weights.of(module, video)


def test_lpips_with_given_weights(programs, model, tmp_path):
  records.write_shards([launching.clip(4, 32, 40)], tmp_path / "clips")
  weights = tmp_path / "alex.safetensors"
  module = lpips.LPIPS("alex")
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  params = random_weights.of(module, image, image)["params"]
  rules = table.layouts("alex")["lpips"]
  tensors = engine.torch_tensors(rules, jax.tree.map(abs, params))
  safetensors.numpy.save_file(
    {k: x.read() for k, x in tensors.items()}, weights
  )
  flags = (
    *(f"--model={model[0]}", f"--clips={tmp_path / 'clips'}"),
    *("--frames=2", "--keep"),
  )
  output = tmp_path / "report.json"
  finished, report = evaluate(
    programs, output, *flags, "--lpips=alex", f"--lpips_weights={weights}"
  )
  assert report["lpips"] > 0 and len(report["lpips_by_frame"]) == 2
  assert f"LPIPS {report['lpips']:.4f}" in finished.stdout
  assert "Fetching" not in finished.stdout
  # Kept for a further model.
  (row,) = output.with_suffix(".clips.jsonl").read_text().splitlines()[1:]
  assert json.loads(row)["lpips"] == pytest.approx(report["lpips_by_frame"])
  told = output.with_suffix(".md").read_text().splitlines()[0]
  assert (
    f"clips 1, frames the first 2, size 32 x 40, LPIPS AlexNet of {weights}"
    in told
  )
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


def test_two_seeds_at_given_levels(programs, tmp_path):
  finished, report = evaluate(
    programs,
    tmp_path / "report.json",
    *("--what=semantic", "--prompts=2", "--seeds=2", "--guidance=1"),
    *("--levels=1.0,0.5", "--solver=renoise", "--size=8,64,64"),
  )
  videos = report["videos"]
  assert [v["prompt"] for v in videos[::2]] == [
    v["prompt"] for v in videos[1::2]
  ]
  assert [v["seed"] for v in videos] == [0, 10_000, 1, 10_001]
  assert sorted(report["spread"]) == ["position", "size"]
  settings = report["settings"]
  assert (settings["levels"], settings["solver"]) == ([1.0, 0.5], "renoise")
  assert "spread over 2 seeds: position " in finished.stdout


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "expected one of --clips, --videos and --tfds, found none"),
    (("--clips=a", "--videos=b"), "found --clips and --videos"),
    (("--clips=a", "--size=8"), "--size goes with --videos and --tfds only"),
    (("--clips=a", "--nofvd_windows"), "--fvd_windows goes with --fvd and"),
    (("--clips=a", "--split=b"), "--split goes with --tfds only"),
    (
      ("--clips=a", "--processes=2", "--process=2"),
      "--process must be below --processes=2",
    ),
    (
      ("--clips=a", "--coordinator=b:1", "--processes=2", "--process=0"),
      "processes that share clips do not communicate",
    ),
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
    (("--what=semantic", "--levels=1.0"), "--levels and --solver go together"),
    (
      ("--what=semantic", "--few=causvid", "--steps=3"),
      "--steps is settled by --few",
    ),
    (("--what=semantic", "--few=fast"), "must be one of lightx2v, causvid"),
    (("--at_end",), "Unknown command line flag 'at_end'"),
    (("--what=semantic", "--clips=c"), "Unknown command line flag 'clips'"),
    (
      ("--what=else",),
      "--what must be reconstruction, generation, semantic or vbench-folder,",
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
