"""Numbers of a config that mean nothing are refused before all else."""

import copy

import numpy as np
import pytest

from configs import adapt, tiny
from dcvideogen_jax import errors
from dcvideogen_jax.tiny import evaluators
from dcvideogen_jax.train import ranges, step


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("steps", 0, "config.steps must be a whole number of at least 1, found 0"),
    ("steps", 2.5, "whole number of at least 1, found 2.5"),
    ("seed", -1, "config.seed must be a whole number from 0 to 4294967295"),
    ("keep", 0, "config.keep must be a whole number of at least 1, found 0"),
    ("save_every", -3, "config.save_every .* at least 0, found -3"),
    ("optim.lr", np.nan, "config.optim.lr .* at least 0, found nan"),
    ("optim.lr", -1e-3, "config.optim.lr .* at least 0, found -0.001"),
    ("optim.lr", "1e-3", "config.optim.lr .* at least 0, found '1e-3'"),
    ("optim.betas", (0.9, 1.0), "config.optim.betas.1 .* up to 1, found 1.0"),
    (
      "optim.lr_scale",
      ((".*", 0.0),),
      "lr_scale.0.1 must be a positive number",
    ),
    ("optim.eps", 0.0, "config.optim.eps must be a positive number, found 0.0"),
    ("optim.clip", np.inf, "config.optim.clip .* found inf"),
    ("optim.decay", np.nan, "config.optim.decay .* found nan"),
    ("optim.final", np.nan, "config.optim.final .* found nan"),
    ("optim.momentum", 0.9, "config.optim has the keys name, .*'momentum'"),
    ("ema.decay", np.nan, "config.ema.decay must be .* up to 1, found nan"),
    ("val.batches", 0, "config.val.batches .* at least 1, found 0"),
    ("val.size", 1, "config.val has the keys data, .*, found 'size'"),
    ("loss.l1", np.nan, "config.loss.l1 must be a finite number, found nan"),
  ],
)
def test_refused(monkeypatch, name, value, message):
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  *parts, last = name.split(".")
  part = config
  for key in parts:
    part = part[key]
  part[last] = value
  monkeypatch.setattr(step, "build_task", None)  # Nothing is built before.
  with pytest.raises(errors.UserError, match=message):
    step.plan(config)


def test_evaluators():
  config = adapt.get_config("tiny_t2v,phase=lora").to_dict()
  config["evaluators"]["semantic"]["shift"] = 0.0
  message = "config.evaluators.semantic.shift must be a positive number"
  with pytest.raises(errors.UserError, match=message):
    evaluators.build(config)


@pytest.mark.parametrize("name", ["tiny_t2v", "wan_i2v_14b"])
def test_what_ships_fits(name):
  for phase in adapt.PHASES:
    ranges.check(adapt.get_config(f"{name},phase={phase}").to_dict())


def test_no_validation_needs_no_batches():
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  config["val"] |= {"every": 0, "batches": 0}
  before = copy.deepcopy(config)
  ranges.check(config)
  assert config == before
