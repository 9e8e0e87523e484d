"""The tiny family's chains: their stages, and the results of the ablation."""

import json
import os
import pathlib
import re
import subprocess

import numpy as np
import PIL.Image
import pytest

from benchmarks import (
  ablation,
  autoencoder_ablation,
  designs,
  distillation,
  reproduce,
  transfer,
)
from dcvideogen_jax import files
from dcvideogen_jax.sample import layouts
from dcvideogen_jax.tiny import chain, family
from dcvideogen_jax.train import step


def configured(argument):
  """Returns the --config value and the overridden keys of a training stage."""
  given = dict(
    item.removeprefix("--").split("=", 1) for item in argument if "=" in item
  )
  return given["config"], [k for k in given if k.startswith("config.")]


def has(config, key):
  for part in key.split(".")[1:]:
    if part not in config:
      return False
    config = config[part]
  return True


@pytest.mark.parametrize(
  "stage",
  [
    stage
    for stage in (
      *family.STAGES,
      *reproduce.STREAM_STAGES,
      *ablation.stages(["0"]),
      *designs.STAGES,
      *autoencoder_ablation.stages(["0"], 3),
      *distillation.stages(["0"]),
      *transfer.stages(),
    )
    if stage.program == "launch.train"
  ],
  ids=lambda stage: stage.name,
)
def test_stages_override_what_their_config_has(stage):
  from configs import adapt, tiny

  name, keys = configured(stage.arguments)
  path, _, argument = name.partition(":")
  made = {"configs/tiny.py": tiny, "configs/adapt.py": adapt}[path]
  config = made.get_config(argument)
  assert [key for key in keys if not has(config, key)] == []


@pytest.mark.parametrize("design", designs.DESIGNS)
def test_clips_fit_the_designs(design):
  from configs import tiny

  (stage,) = (x for x in designs.STAGES if x.name == f"{design}_48_1")
  given = dict(item[2:].split("=", 1) for item in stage.arguments)
  config = tiny.get_config(given.pop("config").partition(":")[2])
  config.update_from_flattened_dict(
    {k: int(v) if v.isdigit() else v for k, v in given.items()}, "config."
  )
  step.build_task(config)
  assert config.model.latent_channels == 256 and config.batch_size == 2
  assert config.steps * config.data.frames == 40_000


@pytest.mark.parametrize(
  "stages",
  [
    (*family.STAGES, *transfer.stages()),
    distillation.stages(["0", "1"]),
  ],
  ids=len,
)
def test_stages_read_what_earlier_ones_made(stages):
  made = ["{work}", "models"]
  for stage in stages:
    for argument in stage.arguments:
      _, _, value = argument.partition("=")
      own = f"{{work}}/{stage.name}"
      if value.startswith("{work}/") and not value.startswith(own):
        assert any(value.startswith(f"{{work}}/{path}") for path in made), value
    made.append(re.sub("/(model|index.json)$", "", stage.output))


def _finish(folder):
  """A stage is done once its folder holds something."""
  files.make_directory(folder)
  (folder / "config.json").touch()


def test_a_chain_is_told_and_checked(programs, tmp_path):
  def run(*flags):
    return programs.run("launch.reproduce", f"--workdir={tmp_path}", *flags)

  _finish(tmp_path / "clips")
  told = run(
    "--dry_run", "--until=autoencoder_real", "--extra=autoencoder_real:--x=1"
  )
  lines = told.stdout.splitlines()
  assert told.code == 0
  assert ["prepare_clips --split=heldout" in lines[0], len(lines)] == [True, 2]
  assert lines[1].endswith("--x=1")
  assert [path.name for path in tmp_path.iterdir()] == ["clips"]
  for flag, sentence in (
    ("--until=nothing", "--until must be one of clips, "),
    ("--extra=base", "--extra must be STAGE:FLAG"),
  ):
    refused = run("--dry_run", flag)
    assert refused.code == 2
    assert sentence in refused.stderr


def test_stages_keep_memory_unless_told_otherwise(monkeypatch, tmp_path):
  seen = {}

  def run(line, env):
    seen.update(env)
    return subprocess.CompletedProcess(line, 0)

  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
  stage = chain.Stage("one", "made", "train", ())
  assert not chain.run([stage], tmp_path)
  assert seen["MALLOC_MMAP_MAX_"] == "0"
  assert seen["MALLOC_ARENA_MAX"] == "7"
  assert seen["PATH"] == os.environ["PATH"]


def test_ablation_needs_a_base(programs, tmp_path):
  found = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--ablation"
  )
  assert found.code == 2
  assert "has no base/model: run launch.reproduce --until=base" in found.stderr


def test_streams_of_finished_models(programs, tmp_path):
  """Once all stages are done, the models' parts.json files point to them."""
  refused = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--streams"
  )
  assert refused.code == 2
  assert "has no shipped/transformer_t2v: run" in refused.stderr
  transformers = {"lora": "shipped/transformer_t2v", "causal": "causal/model"}
  for name in (*transformers.values(), "autoencoder/model"):
    files.make_directory(tmp_path / name)
  for stage in reproduce.STREAM_STAGES:
    made = tmp_path / stage.output
    if stage.program == "launch.train":
      _finish(made)
    else:
      files.make_directory(made.parent)
      made.write_text("{}")
  done = programs.run("launch.reproduce", f"--workdir={tmp_path}", "--streams")
  assert done.code == 0, done.stderr
  for name, transformer in transformers.items():
    found = layouts.find(tmp_path / "models" / name, "t2v")
    assert found.text_tokens == 32
    assert found.dc_ae_v == tmp_path / "autoencoder" / "model"
    assert found.transformer == tmp_path / transformer
    assert found.scheduler.is_file() and found.tokenizer.is_dir()


def test_results_of_finished_arms(programs, tmp_path):
  """Steps count over an arm's phases; seeds are averaged."""
  rng = np.random.default_rng(0)
  values = {}

  def record(folder, step, value=None):
    _finish(folder / "model")
    line = {"step": step}
    if value is not None:
      kinds = {f"semantic/{x}": value for x in ("colour", "shape", "motion")}
      line |= {"semantic/all": value, **kinds}
    with (folder / "metrics.jsonl").open("a") as out:
      out.write(json.dumps(line) + "\n")

  record(tmp_path / "base", 9, 0.9)
  for seed in "01":
    for arm, (_, phases) in ablation.ARMS.items():
      folder = tmp_path / "ablation" / f"{arm}_{seed}"
      for phase, _ in phases:
        value = None if phase == "embed" else float(rng.random())
        record(folder / phase, 10, value)
        values.setdefault(arm, []).append(value)
  found = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--ablation", "--seeds=0,1"
  )
  assert found.code == 0, found.stderr
  output = tmp_path / "ablation"
  results = json.loads((output / "results.json").read_text())
  assert results["base"][0]["semantic/all"] == 0.9
  _, head, lora = values["adapt"][:3]
  found = [(x["step"], x["semantic/all"]) for x in results["runs"]["adapt"][0]]
  assert found == [(20, head), (30, lora)]
  table = (output / "table.md").read_text()
  mean = 50 * (values["direct"][0] + values["direct"][1])
  rows = [line.split(" | ") for line in table.splitlines()]
  columns = [int(x) for x in rows[0][1:-3]]
  row = next(r for r in rows if "fine-tuning without alignment" in r[0])
  shown = dict(zip(columns, (x.strip() for x in row[1:-3]), strict=True))
  assert columns == [6, 12, 18, 24, 30]
  assert [x.strip(" |") for x in row[-3:]] == [f"{mean:.0f}"] * 3
  assert all((step < 10) == (x == "") for step, x in shown.items())
  assert all(x.startswith(f"{mean:.1f} (") for x in shown.values() if x)
  assert rows[-1][0] == "| the base"
  assert rows[-1][5:] == ["90.0", "90", "90", "90 |"]
  assert PIL.Image.open(output / "curves.png").width > 500


def test_the_table_of_the_recipe(programs, tmp_path):
  """Figures of each net where they belong, averaged over the seeds."""
  for name in ("clips", "heldout_clips"):
    (tmp_path / name).mkdir()
  number = 0.0
  for stage in autoencoder_ablation.stages(["0", "1"], 3):
    made = tmp_path / stage.output
    files.make_directory(made.parent)
    if stage.program == "launch.train":
      _finish(made)
      continue
    number += 1
    keys = ("psnr", "ssim", "lpips", "fvd")
    made.write_text(json.dumps(dict.fromkeys(keys, number)))
  found = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--recipe", "--seeds=0,1"
  )
  assert found.code == 0, found.stderr
  rows = (tmp_path / "recipe" / "table.md").read_text().splitlines()
  # The shipped model's two reports are 1 and 2, the first arm's 3 and 4, and
  # with the other seed 15 and 16.
  assert rows[2] == (
    "| none: the model that ships | 1.00 | 1.0000 | 1.0000 | 2.0000 | 1.0 |"
  )
  assert rows[3].startswith("| L1 | 9.00 (3.00-15.00) | ")
  assert "| 10.0000 (4.0000-16.0000) |" in rows[3]
  assert len(rows) == 3 + len(autoencoder_ablation.ARMS)


def test_the_table_of_the_distillation(programs, tmp_path):
  """Each student's figures are in its row, averaged over the seeds."""
  number = 0
  for stage in distillation.stages(["0", "1"]):
    made = tmp_path / stage.output
    files.make_directory(made.parent)
    if stage.program == "launch.evaluate":
      number += 1
      found = {
        "accuracy": dict.fromkeys(
          ("all", "colour", "shape", "motion"), number / 100
        ),
        "spread": dict.fromkeys(("position", "size"), number),
      }
      made.write_text(json.dumps(found))
    elif made.suffix:
      made.write_text("{}")
    else:
      _finish(made)
  found = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--distillation", "--seeds=0,1"
  )
  assert found.code == 0, found.stderr
  rows = (tmp_path / "distillation" / "table.md").read_text().splitlines()
  # Each has a file of scores and then one of the spread: the teacher's are 1
  # and 2, those of three students 3 to 8, and with the other seed 9 to 14.
  kinds = [row.split(" | ")[:4] for row in rows[2:]]
  assert kinds == [
    ["| t2v", "teacher", "32", "1.0"],
    ["| t2v", "guidance", "16", "6.0 (3.0-9.0)"],
    ["| t2v", "matching", "4", "8.0 (5.0-11.0)"],
    ["| t2v", "consistency", "4", "10.0 (7.0-13.0)"],
    ["| i2v", "teacher", "32", "15.0"],
    ["| i2v", "guidance", "16", "17.0"],
    ["| i2v", "matching", "4", "19.0"],
  ]
  assert rows[3].endswith("| 7.0000 (4.0000-10.0000) |")


def test_the_table_of_the_transfer(programs, tmp_path):
  for name in ("base/model", "shipped/transformer_t2v"):
    _finish(tmp_path / name)
  for stage in transfer.stages():
    made = tmp_path / stage.output
    if stage.program != "launch.evaluate":
      _finish(made)
      continue
    files.make_directory(made.parent)
    kinds = ("all", "colour", "shape", "motion")
    found = {
      kind: int(made.stem) / 10 + i / 100 for i, kind in enumerate(kinds)
    }
    made.write_text(json.dumps({"accuracy": found}))
  found = programs.run(
    "launch.reproduce", f"--workdir={tmp_path}", "--transfer"
  )
  assert found.code == 0, found.stderr
  rows = (tmp_path / "transfer" / "table.md").read_text().splitlines()
  assert rows[2] == "| base | 32 | 0.0 | 1.0 | 2.0 | 3.0 |"
  assert rows[-1] == (
    "| adapted, the base's few-step LoRA | 4 | 70.0 | 71.0 | 72.0 | 73.0 |"
  )


def test_a_chain_needs_a_checkout(programs, tmp_path):
  refused = programs.run("launch.reproduce", f"--workdir={tmp_path / 'new'}")
  assert refused.code == 2
  assert "start it where launch/ and configs/ are" in refused.stderr


def test_the_table_of_designs(tmp_path, monkeypatch):
  """Two seeds of one design and one of another; a third is not trained yet."""
  names = ["chunk_8_384_0", "chunk_8_384_1", "causal_48_1", "causal_48_0"]
  for name in names:
    if name != "causal_48_0":
      _finish(tmp_path / name / "model")
    else:
      (tmp_path / name / "model").mkdir(parents=True)
  stages = {stage.name: stage for stage in designs.STAGES}
  assert stages["chunk_8_384_0"].is_done(tmp_path)
  assert not stages["causal_48_0"].is_done(tmp_path)
  folders = [str(tmp_path / name / "model") for name in names[:3]]

  def run(line):
    given = [x.split("=", 1)[1] for x in line if x.startswith("--model=")]
    assert given == folders and "--frames=40" in line
    (output,) = (x.split("=", 1)[1] for x in line if x.startswith("--output="))
    models = {
      folder: {
        "psnr": 20.0 + i,
        "psnr_std_over_clips": 2.0 + i,
        "ssim": 0.5,
        "ssim_std_over_clips": 0.1,
        "lpips": 0.25,
        "lpips_std_over_clips": 0.05,
        "fvd": 100.0 - 30 * i,
        "fvd_error": 8.0,
      }
      for i, folder in enumerate(folders)
    }
    report = {"about": {"set": "made", "clips": 46}, "models": models}
    pathlib.Path(output).parent.mkdir()
    pathlib.Path(output).write_text(json.dumps(report | {"fvd_n": 46}))
    return subprocess.CompletedProcess(line, 0)

  monkeypatch.setattr(designs.subprocess, "run", run)
  lines = designs.table(
    tmp_path, {40: designs.measure(tmp_path, 40)}
  ).splitlines()
  assert lines[0] == (
    "40 frames: set made, clips 46, frames 40, FVD of whole clips, N = 46."
  )
  assert lines[4:6] == [
    "| 384 | chunk 8 | 2 | 20.50 ± 2.50 (seeds differ by 1.00)"
    " | 0.5000 ± 0.1000 (seeds differ by 0.0000)"
    " | 0.2500 ± 0.0500 (seeds differ by 0.0000)"
    " | 85.0 ± 8.0 (seeds differ by 30.0) |",
    "| 48 | causal | 1 | 22.00 ± 4.00 | 0.5000 ± 0.1000 | 0.2500 ± 0.0500"
    " | 40.0 ± 8.0 |",
  ]
