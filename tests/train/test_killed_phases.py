"""Each phase of AE-Adapt-V, killed at random steps, ends as if undisturbed."""

import random

import numpy as np
import pytest

from configs import adapt
from tests.train import killing

STEPS = 40


def _config(phase):
  return f"tiny_t2v,phase={phase},runlocal"


def _command(phase, workdir):
  return [
    "launch.train",
    f"--config=configs/adapt.py:{_config(phase)}",
    f"--workdir={workdir}",
    f"--config.steps={STEPS}",
    "--config.save_every=1",
    "--config.val.every=0",
    "--config.history=True",
  ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("kills", [2, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["embed", "head", "lora"])
def test_killed_at_random_steps(phase, kills, cache, tmp_path):
  whole, run = tmp_path / "whole", tmp_path / "run"
  code, _, err = killing.finish(killing.start(_command(phase, whole), cache))
  assert code == 0, err
  seed = random.randrange(2**32)
  print("seed", seed)
  killed = killing.run_with_kills(
    _command(phase, run),
    kills,
    np.random.default_rng(seed),
    steps=STEPS,
    cache=cache,
  )
  assert len(killed) == kills
  config = adapt.get_config(_config(phase)).to_dict() | {"steps": STEPS}
  killing.assert_same_bits(
    killing.state(config, whole), killing.state(config, run)
  )
  history = killing.history(run, STEPS)
  assert history == killing.history(whole, STEPS)
  samples = sum(history, [])
  assert len(set(samples)) == len(samples) == config["batch_size"] * STEPS
