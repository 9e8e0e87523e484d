"""Two processes sample, decode and encode together, as one would alone."""

import contextlib
import json
import signal
import socket

import numpy as np
import pytest

from dcvideogen_jax.data import latents, video
from tests.launch import launching
from tests.train import killing

SAMPLE = (
  "launch.sample",
  "--model=tiny",
  "--prompt=a red ball rolls",
  "--crf=0",
  "--config.height=40",
  "--config.width=56",
  "--config.frames=10",
  "--config.steps=2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def start_pair(cache, *command):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  joining = [f"--coordinator=localhost:{port}", "--processes=2"]
  return [
    killing.start([*command, *joining, f"--process={i}"], cache)
    for i in range(2)
  ]


def run_pair(cache, *command):
  (code, out, err), (code_1, out_1, err_1) = (
    killing.finish(process) for process in start_pair(cache, *command)
  )
  assert (code, code_1) == (0, 0), (err, err_1)
  assert all(line.startswith("[Gloo]") for line in out_1.splitlines())
  return out


def assert_nearly_equal(one, other):
  """mp4 files of the best quality, whose pixels may round otherwise."""
  one, other = (np.stack([*video.read_frames(x)]) for x in (one, other))
  assert one.shape == other.shape and one.std() > 1
  assert np.abs(one.astype(int) - other).max() <= 2


@pytest.fixture(scope="module")
def alone(programs, tmp_path_factory):
  output = tmp_path_factory.mktemp("alone")
  finished = programs.run(*SAMPLE, f"--output={output}")
  assert finished.code == 0, finished.stderr
  (path,) = output.glob("*.mp4")
  return path


def test_sampling_over_the_context(alone, cache, tmp_path):
  options = (f"--output={tmp_path / 'out'}", "--config.mesh.context=2")
  assert "1 of 1: a red ball rolls" in run_pair(cache, *SAMPLE, *options)
  names = sorted(x.name for x in (tmp_path / "out").iterdir())
  assert names == sorted(x.name for x in alone.parent.iterdir())
  assert_nearly_equal(tmp_path / "out" / alone.name, alone)


@pytest.mark.slow
def test_an_export_for_vbench_goes_on_together(cache, tmp_path):
  """Process 1, which has no folder, leaves out what process 0 finds there."""
  (tmp_path / "list.txt").write_text("a red ball\n")
  export = [x for x in SAMPLE if not x.startswith("--prompt")]
  export += [
    f"--vbench={tmp_path / 'list.txt'}",
    f"--output={tmp_path / 'out'}",
    "--config.mesh.context=2",
  ]
  for count in (1, 2):
    out = run_pair(cache, *export, f"--vbench_samples={count}")
    assert f"{count} videos; {count - 1} are there, 1 to make" in out
  names = sorted(x.name for x in (tmp_path / "out" / "videos").iterdir())
  assert names == ["a red ball-0.mp4", "a red ball-1.mp4"]


@pytest.mark.nightly
def test_sampling_killed_and_started_again(alone, cache, tmp_path):
  command = (*SAMPLE, f"--output={tmp_path}", "--config.mesh.context=2")
  pair = start_pair(cache, *command)
  for line in pair[0].stdout:
    if line.startswith("1 of 1"):
      break
  pair[1].send_signal(signal.SIGKILL)
  pair[1].wait()
  pair[0].send_signal(signal.SIGKILL)
  assert all(killing.finish(process)[0] < 0 for process in pair)
  assert not list(tmp_path.glob("0*"))
  run_pair(cache, *command)
  assert_nearly_equal(tmp_path / alone.name, alone)


def test_decoding_over_the_columns(programs, cache, tmp_path):
  clip = launching.write_video(
    tmp_path / "clip.mp4", launching.clip(12, 64, 96)
  )
  command = ("launch.reconstruct", "--model=tiny", f"--input={clip}", "--crf=0")
  output = tmp_path / "two"
  out = run_pair(cache, *command, f"--output={output}", "--spatial=2")
  assert f"wrote {output}" in out
  finished = programs.run(*command, f"--output={tmp_path / 'one'}")
  assert finished.code == 0, finished.stderr
  reports = []
  for name in ("one", "two"):
    text = (tmp_path / name / "metrics.json").read_text()
    reports.append(json.loads(text))
  assert reports[1]["settings"]["spatial"] == 2
  np.testing.assert_allclose(
    *(r["psnr"]["mean"] for r in reports), rtol=0, atol=1e-2
  )
  assert_nearly_equal(
    *(tmp_path / name / "reconstruction.mp4" for name in ("one", "two"))
  )


@pytest.mark.slow
def test_encoding_parts_of_one_folder(cache, tmp_path):
  out = run_pair(
    cache,
    *("launch.precompute", "--world=3", "--dc_ae_v=tiny", "--frames=8"),
    *("--bucket=32x32", "--part=1", f"--output={tmp_path / 'out'}"),
  )
  assert "3 of 3 clips" in out and "2 clips in" in out
  assert latents.read_index(tmp_path / "out")["records"] == 3


def test_devices_that_would_be_idle_are_refused(cache, tmp_path):
  command = (*SAMPLE, f"--output={tmp_path / 'out'}")
  with contextlib.ExitStack() as stack:
    pair = [stack.enter_context(p) for p in start_pair(cache, *command)]
    ended = [killing.finish(process) for process in pair]
  for code, _, err in ended:
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and "devices" in err
  assert not (tmp_path / "out").exists()
