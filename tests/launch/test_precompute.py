"""The program that encodes clips beforehand: records, kills, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.data import (
  buckets,
  clip_sources,
  latents,
  parts,
  tokenize,
)
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.models import wan_vae
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.precompute import encoding
from dcvideogen_jax.sample import layouts
from tests import compiling, golden_data
from tests.data import data_sets
from tests.launch import launching

TINY = launching.ROOT / "dcvideogen_jax" / "assets" / "dcvideogen_tiny"
SIZES = buckets.find("32x64,64x32")
SKIPPED = {
  "broken.mp4": "it is truncated",
  "gone.mp4": "it does not exist",
  "short.mp4": "it has 6 frames at 16 per second, fewer than 8",
  "silent.mp4": "it has no caption",
}


def _write_video(path, frames, height, width, seed):
  clip = launching.clip(frames, height, width, seed)
  launching.write_video(path, clip)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """Four clips of two shapes, and all that can be wrong with one."""
  path = tmp_path_factory.mktemp("videos")
  rows = [{"file": "gone.mp4", "caption": "not there"}]
  for i, name in enumerate("abcd"):
    size = (40, 24) if name == "b" else (24, 40)
    _write_video(path / f"{name}.mp4", 8 + i, *size, i)
    texts = [f"{name} moves", f"a long look at {name} that goes on and on"]
    rows.append({"file": f"{name}.mp4", "captions": texts, "scores": [1, 2]})
  _write_video(path / "short.mp4", 5, 24, 40, 7)
  content = (path / "a.mp4").read_bytes()
  (path / "broken.mp4").write_bytes(content[: len(content) // 2])
  shutil.copy(path / "a.mp4", path / "silent.mp4")
  for name in ("short", "broken"):
    rows.append({"file": f"{name}.mp4", "caption": name})
  (path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return path


@pytest.fixture(scope="module")
def base_vae(tmp_path_factory):
  """Directory, module and variables of a random autoencoder like Wan's."""
  module = wan_vae.build(golden_data.WAN_SMALL)
  example = convert.KINDS["wan_vae"].example(module)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *example)
  random = np.random.default_rng(0)

  def fill(x):
    fan_in = max(1, int(np.prod(x.shape[:-1])))
    scale = fan_in**-0.5 if len(x.shape) > 1 else 0.2
    return jnp.asarray(random.normal(size=x.shape) * scale, x.dtype)

  variables = jax.tree.map(fill, shapes)
  directory = tmp_path_factory.mktemp("base") / "vae"
  convert.save(directory, "wan_vae", module, variables)
  return directory, module, variables


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


def _content(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


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
  assert listed.keys() == SKIPPED.keys()
  for file, reason in SKIPPED.items():
    assert listed[file].startswith(reason[:6]), listed
    assert str(videos) not in listed[file]
  assert listed["short.mp4"] == SKIPPED["short.mp4"]


def test_arrays_are_the_encoders(made, videos, base_vae):
  """Batched, padded, streamed: still what the models make of one clip."""
  records = _records(made[0])
  source = clip_sources.Folder(videos, videos / "table.jsonl")
  _, base, base_variables = base_vae
  deep, deep_variables = convert.load("dc_ae_v", TINY.parent / "dc_ae_v_tiny")
  text, text_variables = convert.load("umt5", TINY / "text_encoder")
  clip, clip_variables = convert.load("clip_vision", TINY / "image_encoder")
  tokenizer = tokenize.Tokenizer.from_directory(TINY / "tokenizer")
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
  tokenizer = tokenize.Tokenizer.from_directory(TINY / "tokenizer")
  # parts.json of the tiny models asks for 32 tokens.
  ids, mask = tokenizer([expected], 32)
  module, variables = convert.load("umt5", TINY / "text_encoder")
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
  assert _content(other) == _content(made[0])
  again = programs.run("launch.precompute", *arguments)
  assert "clips per second" not in again.stdout and again.code == 0


def _job(base_vae, output, clips):
  options = encoders_lib.Options(
    frames=8,
    batch=2,
    i2v=False,
    stretch=False,
    budget=2**30,
    precision="highest",
    text_dtype="float32",
    text_tokens=16,
  )
  parts.begin(output, {})
  return encoding.Job(
    clip_sources.World(clips, "train", 0),
    layouts.Paths(wan_vae=base_vae[0]),
    options,
    bucket="32x32",
    per_part=2,
    dtype="float32",
    negative="",
    output=output,
    threads=2,
  )


def test_captions_that_are_cut_are_counted(base_vae, tmp_path):
  """Not the negative prompt, which is longer too."""
  job = _job(base_vae, tmp_path / "out", 2)
  job = job._replace(
    options=job.options._replace(text_tokens=3),
    negative="many words " * 9,
    paths=job.paths._replace(
      text_encoder=TINY / "text_encoder", tokenizer=TINY / "tokenizer"
    ),
  )
  with pytest.warns(UserWarning, match="^2 captions were cut to their first 3"):
    encoding.run(job, range(1))


def test_all_devices_encode(base_vae, tmp_path, monkeypatch):
  """Each its parts, all of them at once, to the same bytes as one."""
  whole = _job(base_vae, tmp_path / "whole", 11)
  one, *_ = devices = jax.local_devices()[:3]
  monkeypatch.setattr(jax, "local_devices", lambda: [one])
  counts = []
  encoding.run(whole, range(6), done=counts.append)
  assert sum(counts) == 11

  together = threading.Barrier(3, timeout=100)
  used = set()
  encode_clips = encoders_lib.Encoders.clips

  def clips(self, *arguments):
    (device,) = jnp.zeros(()).devices()
    if device not in used:
      used.add(device)
      together.wait()
    return encode_clips(self, *arguments)

  monkeypatch.setattr(encoders_lib.Encoders, "clips", clips)
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  spread = _job(base_vae, tmp_path / "spread", 11)
  counts.clear()
  encoding.run(spread, range(6), done=counts.append)
  assert sum(counts) == 11 and used == set(devices)
  assert _content(spread.output) == _content(whole.output)


def test_a_device_that_fails_ends_the_others(base_vae, tmp_path, monkeypatch):
  job = _job(base_vae, tmp_path / "out", 40)
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
  encode_clips = encoders_lib.Encoders.clips

  def clips(self, *arguments):
    if jnp.zeros(()).devices() == {jax.devices()[1]}:
      raise errors.UserError("no more")
    time.sleep(0.1)
    return encode_clips(self, *arguments)

  monkeypatch.setattr(encoders_lib.Encoders, "clips", clips)
  counts = []
  with pytest.raises(errors.UserError, match="no more"):
    encoding.run(job, range(20), done=counts.append)
  assert sum(counts) < 20
  whole = {path.name for path in job.output.glob("part-*")}
  assert len(whole) * job.per_part <= sum(counts)


def test_two_in_one_folder_share_the_parts(base_vae, tmp_path):
  """Each is made once: a part that the other makes is left to it."""
  whole = _job(base_vae, tmp_path / "whole", 4)
  encoding.run(whole, range(2))
  shared = _job(base_vae, tmp_path / "shared", 4)
  counts = []
  with parts.locked(shared.output, 0) as other:
    assert other
    encoding.run(shared, range(2), done=counts.append)
    assert [parts.is_done(shared.output, n) for n in range(2)] == [False, True]
  assert sum(counts) == 2
  assert parts.finish(shared.output, 2) is None
  encoding.run(shared, range(2), done=counts.append)
  assert sum(counts) == 4
  assert _content(shared.output) == _content(whole.output)


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
  assert _content(killed) == _content(whole)
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


def test_a_look_beforehand(programs, videos):
  """Without any weights: the released models are meant."""
  finished = programs.run(
    "launch.precompute",
    f"--videos={videos}",
    f"--captions={videos / 'table.jsonl'}",
    "--frames=8",
    "--bucket=32x64,64x32",
    "--text_tokens=8",
    "--dry_run",
  )
  assert finished.code == 0, finished.stderr
  lines = finished.stdout.splitlines()
  assert lines[:3] == [
    "4 of 8 clips can be used",
    "      32x64  3",
    "      64x32  1",
  ]
  assert lines[3].startswith("durations: 0.6 to 0.9 s, median 0.8 s")
  # Per clip 2 x 1 x 2 x 32 + 2 x 4 x 8 x 16 latents. Of the two captions, one
  # has some 2 tokens and the other is cut to 8.
  size = 4 * 4 * (128 + 1024 + (1 + 7 // 4 + 8) * 4096)
  assert lines[4] == f"about {size / 1e3:.3g} kB would be written"
  assert lines[5:9] == [
    f"  {name}.mp4: 12.5 frames per second, some are repeated"
    for name in "abcd"
  ]
  assert lines[9] == (
    "left out: 1 without a caption, 3 missing, damaged or too short"
  )
  assert {line.split(":")[0].strip() for line in lines[10:]} == SKIPPED.keys()


def test_a_look_tells_of_captions_that_are_cut(programs):
  """And ends with another code where nothing is left."""
  arguments = ("--world=3", "--model=tiny", "--bucket=32x32", "--dry_run")
  finished = programs.run("launch.precompute", *arguments, "--text_tokens=3")
  assert finished.code == 0, finished.stderr
  told = "3 captions would be cut to their first 3 tokens"
  assert told in finished.stdout.splitlines()
  finished = programs.run("launch.precompute", *arguments)
  assert finished.code == 0 and "tokens" not in finished.stdout


def test_a_look_at_nothing_usable(programs, videos):
  finished = programs.run(
    "launch.precompute",
    f"--videos={videos}",
    f"--captions={videos / 'table.jsonl'}",
    "--frames=400",
    "--bucket=32x64",
    "--dry_run",
  )
  assert finished.code == 2
  assert finished.stdout.startswith("0 of 8 clips can be used")
  assert "error: none of 8 clips can be used" in finished.stderr


def test_a_look_at_a_tfds_data_set(programs, videos, tmp_path):
  content = (videos / "a.mp4").read_bytes()
  row = {"video": content, "captions": ["a clip"], "scores": [1.0]}
  data_sets.write(tmp_path, [row])
  finished = programs.run(
    "launch.precompute",
    "--tfds=tiny_clips",
    f"--data_dir={tmp_path}",
    "--frames=8",
    "--bucket=32x64",
    f"--base_vae={TINY}",
    "--dry_run",
  )
  assert "1 of 1 clips can be used" in finished.stdout, finished.stderr


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
