"""The program that encodes clips beforehand: records, kills, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.data import buckets, clip_sources, latents, parts, tokenize
from dcvideogen_jax.latents import conditions
from tests import compiling
from tests.launch import launching, precomputing

SIZES = buckets.find("32x64,64x32")


def _arguments(videos, base_vae, output, *more):
  return (
    f"--videos={videos}",
    f"--captions={videos / 'table.jsonl'}",
    "--model=tiny",
    f"--base_vae={base_vae[0]}",
    f"--output={output}",
    "--i2v",
    "--frames=8",
    "--bucket=32x64,64x32",
    "--batch=2",
    "--part=3",
    *more,
  )


@pytest.fixture(scope="module")
def made(programs, videos, base_vae, tmp_path_factory):
  output = tmp_path_factory.mktemp("made") / "out"
  arguments = _arguments(videos, base_vae, output)
  finished = programs.run("launch.precompute", *arguments)
  assert finished.code == 0, finished.stderr
  return output, finished


def _records(directory):
  """File -> bucket, arrays and meta."""
  index = latents.read_index(directory)
  found = {}
  for bucket in index["buckets"]:
    for record in latents.Records(directory, bucket, index):
      arrays, meta = latents.decode(record)
      found[meta["file"]] = bucket, arrays, meta
  return found


def test_what_can_be_used_is_encoded(made):
  output, finished = made
  index = latents.read_index(output)
  assert index["records"] == 4
  assert index["facts"] == {"latent_scale": 2.9315}
  assert {k: v["records"] for k, v in index["buckets"].items()} == {
    "32x64": 3,
    "64x32": 1,
  }
  assert index["buckets"]["32x64"]["shapes"] == {
    "base": [2, 8, 16, 2],
    "base_condition": [2, 8, 16, 2],
    "deep": [2, 1, 2, 64],
    "deep_condition": [2, 1, 2, 64],
    "image": [17, 64],
    "text": None,
  }
  assert "8 clips in" in finished.stdout
  assert "clips per second" in finished.stdout
  assert f"{output}: 4 of 8 clips (32x64 3, 64x32 1)" in finished.stdout


def test_what_cannot_be_used_is_listed(made, videos):
  lines = (made[0] / "skipped.jsonl").read_text().splitlines()
  listed = {row["file"]: row["reason"] for row in map(json.loads, lines)}
  assert listed.keys() == precomputing.SKIPPED.keys()
  for file, reason in precomputing.SKIPPED.items():
    assert listed[file].startswith(reason[:6]), listed
    assert str(videos) not in listed[file]
  assert listed["short.mp4"] == precomputing.SKIPPED["short.mp4"]


def test_arrays_are_the_encoders(made, videos, base_vae):
  """Batched, padded, streamed: still what the models make of one clip."""
  records = _records(made[0])
  source = clip_sources.Folder(videos, videos / "table.jsonl")
  _, base, base_variables = base_vae
  deep, deep_variables = convert.load(
    "dc_ae_v", precomputing.TINY.parent / "dc_ae_v_tiny"
  )
  text, text_variables = convert.load(
    "umt5", precomputing.TINY / "text_encoder"
  )
  clip, clip_variables = convert.load(
    "clip_vision", precomputing.TINY / "image_encoder"
  )
  tokenizer = tokenize.Tokenizer.from_directory(precomputing.TINY / "tokenizer")
  names = {source[i].file: i for i in range(len(source))}
  modules = {"base": base, "deep": deep, "text": text, "image": clip}
  variables = {
    "base": base_variables,
    "deep": deep_variables,
    "text": text_variables,
    "image": clip_variables,
  }
  file = "c.mp4"
  loaded = source.load(names[file], 8, SIZES)
  bucket, arrays, meta = records[file]
  assert bucket == "32x64" and meta == loaded.meta
  ids, mask = tokenizer(loaded.meta["captions"], 32)
  pixels = loaded.pixels(clip.image_size, False)
  batch = {"video": loaded.video, "pixels": pixels}
  batch = {name: values[None] for name, values in batch.items()}
  batch |= {"ids": ids, "mask": mask}
  expected = jax.jit(lambda v, b: conditions.clips(modules, v, b))(
    variables, batch
  )
  for name in ("base", "deep", "base_condition", "deep_condition", "image"):
    np.testing.assert_allclose(arrays[name], expected[name][0], atol=2e-4)
  for found, values, known in zip(
    arrays["text"], expected["text"], mask, strict=True
  ):
    assert len(found) == known.sum()
    np.testing.assert_allclose(found, values[: len(found)], atol=2e-4)


def test_the_negative_prompt(made):
  """Of image to video, as it was asked for, cut as sampling cuts it."""
  settings = latents.read_index(made[0])["settings"]
  expected = tokenize.NEGATIVE_PROMPTS["wan_i2v"]
  assert settings["negative_prompt"] == expected
  tokenizer = tokenize.Tokenizer.from_directory(precomputing.TINY / "tokenizer")
  # parts.json of the tiny models asks for 32 tokens.
  ids, mask = tokenizer([expected], 32)
  module, variables = convert.load("umt5", precomputing.TINY / "text_encoder")
  text = jax.jit(lambda v: conditions.text(module, v, ids, mask))(variables)
  assert mask.all()
  np.testing.assert_allclose(latents.negative(made[0]), text[0], atol=2e-4)


def test_two_runs_give_the_same_bytes(programs, made, videos, base_vae):
  """By reading threads one at a time, and as two machines."""
  other = made[0].with_name("other")
  arguments = _arguments(videos, base_vae, other, "--processes=2")
  first = programs.run(
    "launch.precompute", *arguments, "--process=1", "--threads=1"
  )
  assert "2 parts are left to other processes" in first.stdout, first.stderr
  with pytest.raises(errors.UserError, match="not finished"):
    latents.read_index(other)
  second = programs.run("launch.precompute", *arguments)
  assert second.code == 0, second.stderr
  assert precomputing.content(other) == precomputing.content(made[0])
  again = programs.run("launch.precompute", *arguments)
  assert "clips per second" not in again.stdout and again.code == 0


def _world(base_vae, output, *more):
  return (
    "--world=60",
    "--seed=3",
    "--split=heldout",
    f"--base_vae={base_vae[0]}",
    "--frames=8",
    "--bucket=32x32",
    "--part=1",
    "--dtype=bfloat16",
    f"--output={output}",
    *more,
  )


def _wait(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "nothing happens"
    time.sleep(0.02)


def test_a_killed_run_is_continued_to_the_same_bytes(
  programs, base_vae, tmp_path
):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finished = programs.run("launch.precompute", *_world(base_vae, whole))
  assert finished.code == 0, finished.stderr
  process = subprocess.Popen(
    [sys.executable, "-m", "launch.precompute", *_world(base_vae, killed)],
    cwd=launching.ROOT,
    env={**os.environ, "XLA_FLAGS": compiling.FLAGS},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  _wait(lambda: len([*killed.glob("part-*")]) > 1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = {path: path.stat().st_mtime_ns for path in killed.glob("part-*")}
  assert 0 < len(done) < 60
  finished = programs.run("launch.precompute", *_world(base_vae, killed))
  assert finished.code == 0, finished.stderr
  assert precomputing.content(killed) == precomputing.content(whole)
  assert (
    done.items()
    <= {path: path.stat().st_mtime_ns for path in killed.glob("part-*")}.items()
  )
  record = _records(whole)["world/heldout/3/0"]
  assert record[1].keys() == {"base"} and record[1]["base"].dtype == "bfloat16"
  assert record[2]["scene"].keys() >= {"colour", "shape", "motion"}


def test_a_full_disk(programs, base_vae, tmp_path):
  """One sentence; the same command goes on once there is room."""
  arguments = _world(base_vae, tmp_path / "out", "--world=1")
  finished = programs.run("launch.precompute", *arguments, largest_file=600)
  assert finished.code == 2
  (line,) = [x for x in finished.stderr.splitlines() if "error: " in x]
  assert "cannot write" in line and "Traceback" not in finished.stderr
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert names <= {parts.SETTINGS}
  finished = programs.run("launch.precompute", *arguments)
  assert finished.code == 0, finished.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((), "expected one of --videos, --tfds, --world, found none"),
    (
      ("--videos=.", "--output=o", "--fps=x"),
      "--fps must be frames per second",
    ),
    (("--world=2", "--output=o", "--frames=9"), "multiple of 4, not 9"),
    (("--world=2", "--output=o", "--process=1"), "below --processes=1, not 1"),
    (("--world=2", "--output=o"), "there is no autoencoder: give --model"),
    (("--world=2", "--fps=8"), "--fps goes with --videos or --tfds only"),
    (("--videos=.", "--seed=1"), "--seed goes with --world only"),
    (("--videos=.", "--split=train"), "--split goes with --tfds or --world"),
    (("--world=2", "--captions=x"), "--captions goes with --videos only"),
    (("--world=2", "--stretch"), "--stretch goes with --i2v only"),
    (
      ("--world=2", "--output=o", "--dc_ae_v=tiny", "--bucket=48x64"),
      "the size 48x64 is no multiple of 32",
    ),
  ],
)
def test_bad_input_is_told_in_one_sentence(programs, arguments, words):
  finished = programs.run("launch.precompute", *arguments)
  assert finished.code == 2
  (line,) = [x for x in finished.stderr.splitlines() if "error: " in x]
  assert words in line


def test_other_settings_do_not_continue(programs, made, videos, base_vae):
  arguments = _arguments(videos, base_vae, made[0], "--batch=3")
  finished = programs.run("launch.precompute", *arguments)
  assert finished.code == 2
  assert "begun with other settings: batch was 2 and is 3" in finished.stderr
