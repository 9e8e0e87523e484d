"""`launch.train` and `launch.export` as their users run them."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from dcvideogen_jax import convert, tree
from tests.train import killing

STEPS = 24


def _command(workdir, *arguments, config="tiny.py:autoencoder,runlocal"):
  return [
    *["launch.train", f"--config=configs/{config}", f"--workdir={workdir}"],
    *arguments,
  ]


def _train(workdir):
  return _command(
    workdir,
    f"--config.steps={STEPS}",
    "--config.save_every=1",
    "--config.val.every=0",
    "--config.history=True",
  )


def _state(workdir):
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  return killing.state(config | {"steps": STEPS}, workdir)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
  """The directory of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("program") / "whole"
  code, out, err = killing.finish(killing.start(_train(workdir), cache))
  assert code == 0, err
  assert f"step {STEPS}/{STEPS}" in out
  return workdir


def _assert_undisturbed(workdir, finished):
  killing.assert_same_bits(_state(finished), _state(workdir))
  history = killing.history(workdir, STEPS)
  assert history == killing.history(finished, STEPS)
  samples = sum(history, [])
  assert len(set(samples)) == len(samples) == 4 * STEPS


@pytest.mark.parametrize(
  "kills", [2, pytest.param(10, marks=pytest.mark.nightly)]
)
def test_killed_at_random_steps(finished, cache, tmp_path, kills):
  seed = random.randrange(2**32)
  print("seed", seed)
  killed = killing.run_with_kills(
    _train(tmp_path / "run"),
    kills,
    np.random.default_rng(seed),
    steps=STEPS,
    cache=cache,
  )
  assert len(killed) == kills
  _assert_undisturbed(tmp_path / "run", finished)


def test_terminated_and_resumed(finished, cache, tmp_path):
  process = killing.start(_train(tmp_path / "run"), cache)
  killing.read_to(process, random.randint(1, STEPS // 2))
  time.sleep(random.uniform(0, 0.05))
  process.send_signal(signal.SIGTERM)
  code, out, err = killing.finish(process)
  assert code == 143 and "SIGTERM: saved step" in out, (code, out, err)
  resumed = killing.finish(killing.start(_train(tmp_path / "run"), cache))
  assert resumed[0] == 0, resumed
  assert "resuming after step" in resumed[1]
  _assert_undisturbed(tmp_path / "run", finished)


def test_a_full_disk_is_one_sentence(finished, cache, tmp_path):
  """Which a supervisor does not retry; what was saved is continued from."""
  code, _, err = killing.finish(
    killing.start(_train(tmp_path), cache, largest_file="9")
  )
  assert code == 2 and "Traceback" not in err, err
  (line,) = [x for x in err.splitlines() if "error: " in x]
  assert line.startswith(f"error: cannot save to {tmp_path / 'checkpoints'}: ")
  code, _, err = killing.finish(killing.start(_train(tmp_path), cache))
  assert code == 0, err
  _assert_undisturbed(tmp_path, finished)


def test_export_is_the_average_in_bfloat16(finished, tmp_path):
  finishing = subprocess.run(
    [
      *[sys.executable, "-m", "launch.export", f"--workdir={finished}"],
      f"--output={tmp_path / 'model'}",
    ],
    cwd=killing.ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  assert finishing.returncode == 0, finishing.stderr
  _, variables = convert.load("dc_ae_v", tmp_path / "model")
  saved = _state(finished)
  assert any(
    (saved[f"ema/{k}"] != saved[f"params/{k}"]).any()
    for k in tree.flatten(variables["params"])
  )
  for name, value in tree.flatten(variables["params"]).items():
    expected = jnp.asarray(saved[f"ema/{name}"], jnp.bfloat16)
    np.testing.assert_array_equal(
      jax.device_get(value).astype(np.float32), np.float32(expected)
    )


@pytest.mark.parametrize(
  ("arguments", "config", "word"),
  [
    (["--config.optim.lrr=1"], "tiny.py:autoencoder,runlocal", "lrr"),
    ([], "tiny.py:autoencoder,fast", "fast"),
    (["--config.optim.name=lion"], "tiny.py:autoencoder,runlocal", "lion"),
    (["--config.data.path=/nowhere"], "tiny.py:autoencoder", "/nowhere"),
    (["--export=README.md"], "tiny.py:autoencoder,runlocal", "README.md"),
    (["--process=1"], "tiny.py:autoencoder,runlocal", "--coordinator"),
    (
      ["--coordinator=here", "--processes=2", "--process=2"],
      "tiny.py:autoencoder,runlocal",
      "within 0..1",
    ),
  ],
)
def test_bad_input_is_one_sentence(tmp_path, cache, arguments, config, word):
  command = _command(tmp_path / "run", *arguments, config=config)
  code, _, err = killing.finish(killing.start(command, cache))
  assert code == 2
  assert err.startswith("error: ") and err.count("\n") == 1 and word in err
