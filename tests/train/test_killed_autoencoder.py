"""Each phase of DC-AE-V's training, killed at random, ends as undisturbed."""

import random

import numpy as np
import pytest

from configs import tiny
from tests.train import killing

STEPS, BATCH = 5, 8
OPTIONS = {"r1": 0.1, "lecam": 0.1, "spectral": True}


def _config(phase):
  return f"autoencoder,phase={phase},runlocal"


def _flags(phase):
  flags = {
    "steps": STEPS,
    "batch_size": BATCH,
    "save_every": 1,
    "log_every": 1,
    "val.every": 0,
    "history": True,
    "accumulate": 2,
    "data.images": 0.4,
    "data.image_frames": 2,
    "mesh.data": 1,
  }
  if phase == "adversarial":
    flags |= {f"discriminator.{k}": v for k, v in OPTIONS.items()}
  return flags


def _command(phase, workdir):
  flags = [f"--config.{name}={value}" for name, value in _flags(phase).items()]
  config = f"--config=configs/tiny.py:{_config(phase)}"
  return ["launch.train", config, f"--workdir={workdir}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
  "phase",
  [
    *(pytest.param(x, marks=pytest.mark.nightly) for x in ("low", "high")),
    "adversarial",
    pytest.param("fast", marks=pytest.mark.nightly),
  ],
)
def test_killed_at_random_steps(phase, tmp_path):
  cache, whole, run = (tmp_path / name for name in ("cache", "whole", "run"))
  code, _, err = killing.finish(killing.start(_command(phase, whole), cache))
  assert code == 0, err
  seed = random.randrange(2**32)
  print("seed", seed)
  rng = np.random.default_rng(seed)
  command = _command(phase, run)
  # A step with LPIPS takes longer than the delay before a kill.
  killed = killing.run_with_kills(
    command, 2, rng, steps=STEPS, cache=cache, room=2
  )
  assert len(killed) == 2
  config = tiny.get_config(_config(phase))
  config.update_from_flattened_dict(_flags(phase))
  config = config.to_dict()
  expected = killing.state(config, whole)
  killing.assert_same_bits(expected, killing.state(config, run))
  if phase == "adversarial":
    names = [name for name in expected if name.startswith("opt/")]
    assert any("discriminator/mu" in n or "/discriminator/" in n for n in names)
    assert expected["params/discriminator/state/lecam/real"] != 0
  history = killing.history(run, STEPS)
  assert history == killing.history(whole, STEPS)
  assert {len(samples) for samples in history} == {BATCH, 2 * BATCH}
