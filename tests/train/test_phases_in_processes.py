"""A phase of AE-Adapt-V in two processes, on files, equals it in one."""

import contextlib

import jax
import numpy as np
import pytest

from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import inputs, step
from tests.train import encoded_config, killing, pairs

STEPS = 3
CHANGES = {
  "steps": STEPS,
  "batch_size": 4,
  "history": True,
  "text_dropout": 0.5,
  "val.every": STEPS,
  "val.batch_size": 4,
  "mesh.data": 1,
  "mesh.fsdp": 2,
  # Adam amplifies rounding.
  "optim.name": "sgd",
  "optim.lr": 0.1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def _flags(changes):
  return [f"--config.{key}={value}" for key, value in changes.items()]


def _train(phase, workdir, changes):
  return [
    "launch.train",
    f"--config=tests/train/encoded_config.py:tiny_t2v,phase={phase}",
    *_flags(changes),
    f"--workdir={workdir}",
  ]


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache):
  """What the second phase starts from, its clips and the negative prompt."""
  folder = tmp_path_factory.mktemp("start")
  encoded_config.write(folder / "clips", 30)
  clips = {
    f"{data}.path": str(folder / "clips") for data in ("data", "val.data")
  }
  for phase in ("base", "embed"):
    ended = killing.finish(
      killing.start(
        [
          *_train(phase, folder / phase, {"steps": 1} | clips),
          f"--export={folder / phase / 'model'}",
        ],
        cache,
      )
    )
    assert ended[0] == 0, ended
  text = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
  np.save(folder / "negative.npy", text)
  return clips | {
    "start.random": False,
    "start.base": str(folder / "base" / "model"),
    "start.patch_embed": str(folder / "embed" / "model"),
    "negative": str(folder / "negative.npy"),
  }


@pytest.mark.slow
def test_the_second_phase_in_two_processes(start, cache, tmp_path, monkeypatch):
  ended = pairs.finish(
    pairs.start(_train("head", tmp_path, CHANGES | start), cache)
  )
  assert [code for code, *_ in ended] == [0, 0], ended
  assert "val/loss_0.9" in ended[0][1]
  samples = [
    sample
    for process in range(2)
    for sample in sum(killing.history(tmp_path, STEPS, process), [])
  ]
  assert len(set(samples)) == len(samples) == 4 * STEPS
  config = encoded_config.get_config("tiny_t2v,phase=head")
  config.update_from_flattened_dict(CHANGES | start)
  config = config.to_dict()
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda c, _: make_mesh(c, jax.devices()[:2])
  )
  run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  first = jax.device_get(state.params)
  with contextlib.ExitStack() as stack:
    shards = [
      stack.enter_context(
        contextlib.closing(
          inputs.batches(
            config["data"], batch_size=2, seed=0, shard_index=i, shard_count=2
          )
        )
      )
      for i in range(2)
    ]
    stack.enter_context(jax.set_mesh(run.mesh))
    for _ in range(STEPS):
      parts = [next(shard) for shard in shards]
      batch = {
        name: np.concatenate([part[name] for part in parts])
        for name in parts[0]
      }
      state, _ = advance(state, frozen, step.put(run.mesh, batch))
  found = killing.state(config, tmp_path)
  for name, expected in tree.flatten(jax.device_get(state.params)).items():
    moved = np.abs(expected - tree.flatten(first)[name]).max()
    assert moved > 0, name
    np.testing.assert_allclose(
      found[f"params/{name}"], expected, rtol=0, atol=1e-3 * moved + 1e-7
    )
