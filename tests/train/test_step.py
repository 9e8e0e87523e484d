"""One step on a 2 x 4 mesh equals the step on one device."""

import jax
import numpy as np
import pytest

from configs import tiny
from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import loop, step


def _after_steps(monkeypatch, mesh, devices, count=2):
  """(metrics of each step, state) with SGD; Adam amplifies rounding."""
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  config["batch_size"], config["mesh"] = 8, mesh
  config["steps"] = 10
  config["data"] |= {"frames": 4}
  config["model"]["chunk_frames"] = 4
  config["optim"] |= {
    "name": "sgd",
    "lr": 0.1,
    "warmup": 0,
    "schedule": "constant",
  }
  make_mesh = sharding.make_mesh
  with monkeypatch.context() as m:
    m.setattr(sharding, "make_mesh", lambda c: make_mesh(c, devices))
    run = step.plan(config)
  state, advance = step.init(run), step.compile_step(run, config)
  data, seen = loop.batches(config["data"], 8, seed=0), []
  with jax.set_mesh(run.mesh):
    for _ in range(count):
      state, metrics = advance(state, step.put(run.mesh, next(data)))
      seen.append({k: float(v) for k, v in metrics.items()})
  data.close()
  return seen, state


def test_sharded_equals_one_device(monkeypatch):
  one, state_one = _after_steps(monkeypatch, {}, jax.devices()[:1])
  many, state_many = _after_steps(
    monkeypatch, {"data": 2, "fsdp": 4}, jax.devices()
  )
  for a, b in zip(one, many, strict=True):
    assert a == pytest.approx(b, rel=1e-5)
  assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-4)
  a, b = tree.flatten(state_one.params), tree.flatten(state_many.params)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_the_state_is_split_over_the_mesh(config):
  run = step.plan(config)
  state = step.init(run)
  names = tree.flatten(state)
  assert {"params/mix/kernel", "ema/mix/kernel", "rng", "step"} <= set(names)
  for name, leaf in names.items():
    if name.endswith("kernel"):
      assert leaf.addressable_shards[0].data.size == leaf.size // 4, name
  assert any(
    n.startswith("opt/") and n.endswith("mu/mix/kernel") for n in names
  )


def test_the_state_is_donated(config):
  run = step.plan(config)
  state, advance = step.init(run), step.compile_step(run, config)
  data = loop.batches(config["data"], 8, seed=0)
  with jax.set_mesh(run.mesh):
    advance(state, step.put(run.mesh, next(data)))
  data.close()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
