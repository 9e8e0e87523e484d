"""`launch.train` and `launch.export` as their users run them."""

import os
import pathlib
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
from dcvideogen_jax import checkpoint, convert, tree
from dcvideogen_jax.train import step

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12


def _start(workdir, *arguments, config="configs/tiny.py:autoencoder,runlocal"):
  environment = os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONUNBUFFERED": "1",
    "XDG_CACHE_HOME": str(workdir.parent / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = [sys.executable, "-m", "launch.train", f"--config={config}"]
  command += [f"--workdir={workdir}", *arguments]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _train(workdir):
  return _start(
    workdir,
    f"--config.steps={STEPS}",
    "--config.save_every=1",
    "--config.val.every=0",
  )


def _finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def _stop_at(process, step, how):
  """Sends a signal some milliseconds after the line of `step`."""
  for line in process.stdout:
    if line.startswith(f"step {step}/"):
      break
  time.sleep(random.uniform(0, 0.05))
  process.send_signal(how)
  return _finish(process)


def _saved(workdir):
  run = step.plan(tiny.get_config("autoencoder,runlocal").to_dict())
  with checkpoint.Checkpointer(workdir / "checkpoints") as saver:
    found = saver.restore(run.state, repair=False)
  assert found.step == STEPS
  return {k: np.asarray(v) for k, v in tree.flatten(found.state).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("program") / "whole"
  code, out, err = _finish(_train(workdir))
  assert code == 0, err
  assert f"step {STEPS}/{STEPS}" in out
  return workdir


@pytest.mark.parametrize(
  ("how", "code"),
  [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)],
)
def test_stopped_at_a_random_step_and_resumed(finished, tmp_path, how, code):
  # By the line of step 3 the save of step 1 is on disk, that of 2 may not be.
  at = random.randint(3, STEPS - 3)
  stopped = _stop_at(_train(tmp_path / "run"), at, how)
  assert stopped[0] == code, stopped
  resumed = _finish(_train(tmp_path / "run"))
  assert resumed[0] == 0, resumed
  assert "resuming after step" in resumed[1]
  expected, found = _saved(finished), _saved(tmp_path / "run")
  assert expected.keys() == found.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_export_is_the_average_in_bfloat16(finished, tmp_path):
  finishing = subprocess.run(
    [
      *[sys.executable, "-m", "launch.export", f"--workdir={finished}"],
      f"--output={tmp_path / 'model'}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  assert finishing.returncode == 0, finishing.stderr
  _, variables = convert.load("dc_ae_v", tmp_path / "model")
  saved = _saved(finished)
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
  ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, config, word):
  process = _start(tmp_path / "run", *arguments, config=f"configs/{config}")
  code, _, err = _finish(process)
  assert code == 2
  assert err.startswith("error: ") and err.count("\n") == 1 and word in err
