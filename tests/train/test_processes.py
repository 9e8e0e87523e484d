"""Two processes train as one, each on its own shard of the data."""

import contextlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from configs import tiny
from dcvideogen_jax import sharding, tree
from dcvideogen_jax.data import pipeline
from dcvideogen_jax.train import step
from tests.train import killing, pairs

STEPS = 10
CHANGES = {
  "steps": STEPS,
  "save_every": 2,
  "log_every": 1,
  "history": True,
  "accumulate": 2,
  "val.every": 3,
  "model.widths": (8, 8, 8),
  "model.depths": (0, 1, 1),
  "model.spatial_factor": 2,
  "model.chunk_frames": 4,
  "data.frames": 4,
  "data.height": 8,
  "data.width": 8,
  "mesh.data": 1,
  "mesh.fsdp": 2,
  # Adam amplifies rounding.
  "optim.name": "sgd",
}


def _config():
  config = tiny.get_config("autoencoder,runlocal")
  config.update_from_flattened_dict(CHANGES)
  return config.to_dict()


def _start(workdir, cache):
  """The two processes of a training."""
  command = [
    *["launch.train", "--config=configs/tiny.py:autoencoder,runlocal"],
    *[f"--config.{key}={value}" for key, value in CHANGES.items()],
    f"--workdir={workdir}",
  ]
  return pairs.start(command, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("pair") / "whole"
  started = _start(workdir, cache)
  (code, out, err), (code_1, out_1, err_1) = pairs.finish(started)
  assert (code, code_1) == (0, 0), (err, err_1)
  assert f"step {STEPS}/{STEPS}" in out and "step" not in out_1
  return workdir


def _histories(workdir):
  return [killing.history(workdir, STEPS, process) for process in range(2)]


def test_each_process_reads_its_own_shard(finished):
  one, other = _histories(finished)
  samples = sum(one + other, [])
  assert len(set(samples)) == len(samples) == 4 * STEPS


def test_two_processes_equal_one(finished, monkeypatch):
  """The same training on two devices of one process, fed with both shards."""
  config = _config()
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda c, _: make_mesh(c, jax.devices()[:2])
  )
  run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  start = jax.device_get(state.params)
  with contextlib.ExitStack() as stack:
    shards = [
      stack.enter_context(
        contextlib.closing(
          pipeline.batches(
            config["data"], batch_size=2, seed=0, shard_index=i, shard_count=2
          )
        )
      )
      for i in range(2)
    ]
    stack.enter_context(jax.set_mesh(run.mesh))
    for _ in range(STEPS):
      video = np.concatenate([next(shard)["video"] for shard in shards])
      state, _ = advance(state, frozen, step.put(run.mesh, {"video": video}))
  found = killing.state(config, finished)
  for name, expected in tree.flatten(jax.device_get(state.params)).items():
    moved = np.abs(expected - tree.flatten(start)[name]).max()
    np.testing.assert_allclose(
      found[f"params/{name}"], expected, rtol=0, atol=1e-3 * moved + 1e-7
    )


def _resume(workdir, cache, finished):
  """Starts both again; the end is as if nothing had happened."""
  ended = pairs.finish(_start(workdir, cache))
  assert [code for code, *_ in ended] == [0, 0], ended
  assert "resuming after step" in ended[0][1]
  killing.assert_same_bits(
    killing.state(_config(), finished), killing.state(_config(), workdir)
  )
  assert _histories(workdir) == _histories(finished)


@pytest.mark.parametrize(
  "victim", [1, pytest.param(0, marks=pytest.mark.nightly)]
)
def test_one_is_killed_and_both_start_again(finished, cache, tmp_path, victim):
  pair = _start(tmp_path, cache)
  # Step 4 is saved only once step 2 is on disk.
  assert killing.read_to(pair[0], 5) >= 5
  pair[victim].send_signal(signal.SIGKILL)
  pair[victim].wait()
  # Alone the other one waits or gives up, and must not save anything.
  time.sleep(0.5)
  pair[1 - victim].send_signal(signal.SIGKILL)
  assert all(code < 0 for code, *_ in pairs.finish(pair))
  _resume(tmp_path, cache, finished)


@pytest.mark.nightly
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_saves_both(finished, cache, tmp_path, told):
  pair = _start(tmp_path, cache)
  assert killing.read_to(pair[0], 1) >= 1
  pair[told].send_signal(signal.SIGTERM)
  (code, out, err), (code_1, _, err_1) = pairs.finish(pair)
  assert (code, code_1) == (143, 143), (err, err_1)
  assert re.search(r"SIGTERM: saved step \d+", out)
  _resume(tmp_path, cache, finished)


@pytest.mark.nightly
def test_what_one_cannot_read_both_leave(finished, cache, tmp_path):
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  newest = tmp_path / "checkpoints" / str(STEPS)
  (newest / "data" / "process_1-of-2.json").write_text("{")
  _resume(tmp_path, cache, finished)
  assert newest.with_name(f"{STEPS}.unreadable").is_dir()
