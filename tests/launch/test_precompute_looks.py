"""What the program that encodes clips tells beforehand, with --dry_run."""

from tests.data import data_sets
from tests.launch import precomputing


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
  assert {
    line.split(":")[0].strip() for line in lines[10:]
  } == precomputing.SKIPPED.keys()


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
    f"--base_vae={precomputing.TINY}",
    "--dry_run",
  )
  assert "1 of 1 clips can be used" in finished.stdout, finished.stderr
