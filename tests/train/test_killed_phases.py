"""Each phase of AE-Adapt-V, killed at random steps, ends as if undisturbed."""

import random

import numpy as np
import pytest

from tests.train import encoded_config, killing

STEPS, BATCH = 20, 8


def _config(phase):
  return f"tiny_t2v,phase={phase}"


def _command(phase, clips, workdir):
  return [
    "launch.train",
    f"--config=tests/train/encoded_config.py:{_config(phase)}",
    f"--config.data.path={clips}",
    f"--config.batch_size={BATCH}",
    f"--workdir={workdir}",
    f"--config.steps={STEPS}",
    "--config.save_every=1",
    "--config.val.every=0",
    "--config.history=True",
  ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """As many as are needed: all of them are seen, and none twice."""
  path = tmp_path_factory.mktemp("clips") / "encoded"
  encoded_config.write(path, STEPS * BATCH)
  return path


@pytest.mark.parametrize(
  "kills", [2, pytest.param(7, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
  "phase",
  [
    pytest.param("embed", marks=pytest.mark.slow),
    pytest.param("head", marks=pytest.mark.slow),
    "lora",
    pytest.param("guidance", marks=pytest.mark.slow),
    pytest.param("few", marks=pytest.mark.slow),
    pytest.param("few,causal=teacher", marks=pytest.mark.nightly),
  ],
)
def test_killed_at_random_steps(phase, kills, clips, cache, tmp_path):
  whole, run = tmp_path / "whole", tmp_path / "run"
  command = _command(phase, clips, whole)
  code, _, err = killing.finish(killing.start(command, cache))
  assert code == 0, err
  seed = random.randrange(2**32)
  print("seed", seed)
  killed = killing.run_with_kills(
    _command(phase, clips, run),
    kills,
    np.random.default_rng(seed),
    steps=STEPS,
    cache=cache,
  )
  assert len(killed) == kills
  config = encoded_config.get_config(_config(phase)).to_dict()
  config |= {"steps": STEPS, "batch_size": BATCH}
  killing.assert_same_bits(
    killing.state(config, whole), killing.state(config, run)
  )
  history = killing.history(run, STEPS)
  assert history == killing.history(whole, STEPS)
  samples = sum(history, [])
  assert len(set(samples)) == len(samples) == BATCH * STEPS
