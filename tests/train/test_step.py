"""One step on a 2 x 4 mesh, or in parts, equals the step on one device."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, tiny
from dcvideogen_jax import errors, sharding, tree
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.train import batch_parts, loop, optim, step, task

MESH = {"data": 1, "fsdp": 2, "tensor": 4}
SGD = {
  "name": "sgd",
  "lr": 0.1,
  "warmup": 0,
  "schedule": "constant",
  "clip": 0.0,
  "decay": 0.0,
}
DIT = {
  "layers": 2,
  "width": 32,
  "heads": 4,
  "ffn_width": 64,
  "in_channels": 6,
  "out_channels": 6,
  "patch": (1, 1, 1),
  "text_width": 16,
  "lora_rank": 2,
  "lora_alpha": 4.0,
}


def _dit(config):
  """Low-rank updates of a diffusion transformer, and its head."""
  del config
  module = wan_dit.build(DIT)

  def init(rng):
    example = jnp.zeros((1, 1, 2, 2, 6)), jnp.zeros(1), jnp.zeros((1, 3, 16))
    variables = module.init(rng, *example)
    # Updates that change something from the first step.
    keys = iter(jax.random.split(rng, 100))
    lora = jax.tree.map(
      lambda x: 0.2 * jax.random.normal(next(keys), x.shape), variables["lora"]
    )
    return {"params": variables["params"], "lora": lora}

  def encode(variables, batch):
    gain = 1 + variables["params"]["patch_embed"]["bias"].mean()
    return {**batch, "latents": gain * batch["latents"]}

  def draw(batch, rng):
    noise, sigma = jax.random.split(rng)
    shape = batch["latents"].shape
    return {
      **batch,
      "noise": jax.random.normal(noise, shape),
      "sigma": jax.random.uniform(sigma, shape[:1]),
    }

  def loss_fn(variables, drawn):
    x, noise = drawn["latents"], drawn["noise"]
    s = drawn["sigma"].reshape(-1, 1, 1, 1, 1)
    velocity = module.apply(
      variables, (1 - s) * x + s * noise, 1000 * drawn["sigma"], drawn["text"]
    )
    error = jnp.square(velocity - (noise - x)).mean((1, 2, 3, 4))
    return error.mean(), {"sigma": drawn["sigma"].mean()}

  rules = (("lora/.*|.*/head/.*", True), (".*", False))
  return task.Task(init, loss_fn, {}, draw, encode, rules)


def _autoencoder_config():
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  config["data"] |= {"frames": 4, "height": 8, "width": 8}
  config["model"] |= {"chunk_frames": 4, "spatial_factor": 2}
  config["model"] |= {"widths": (8, 8, 8), "depths": (0, 1, 1)}
  return config | {"batch_size": 8, "steps": 10, "optim": config["optim"] | SGD}


def _dit_config():
  config = _autoencoder_config() | {"task": "dit"}
  config["optim"]["lr"] = 0.01
  return config | {"sharding": common.DIT_SHARDING}


def _batches(config, run, count):
  if config["task"] == "dit":
    rng = np.random.default_rng(0)
    shapes = {"latents": (8, 2, 2, 2, 6), "text": (8, 3, 16)}
    for _ in range(count):
      yield {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}
    return
  data = loop.batches(run, config["data"], 8, seed=0)
  yield from (next(data) for _ in range(count))
  data.close()


class Run(NamedTuple):
  """What came of some steps; all values are on the host."""

  metrics: list[dict[str, float]]
  start: dict[str, np.ndarray]
  gradient: dict[str, np.ndarray]
  params: dict[str, np.ndarray]


def _run(monkeypatch, config, devices=1, count=2):
  """Some steps with SGD; Adam amplifies rounding."""
  make_mesh, build = sharding.make_mesh, optim.build
  with monkeypatch.context() as m:
    m.setattr(step, "TASKS", {**step.TASKS, "dit": _dit})
    found = jax.devices()[:devices]
    m.setattr(sharding, "make_mesh", lambda c, _: make_mesh(c, found))
    # Without decay its state is the last gradient.
    keep = optax.trace(0.0)
    m.setattr(optim, "build", lambda *args: optax.chain(keep, build(*args)))
    run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  start = jax.device_get(tree.flatten(tree.merge(state.params, frozen)))
  metrics, gradients = [], []
  with jax.set_mesh(run.mesh):
    for batch in _batches(config, run, count):
      state, found = advance(state, frozen, step.put(run.mesh, batch))
      metrics.append({k: float(v) for k, v in found.items()})
      gradients.append(jax.device_get(tree.flatten(state.opt[0].trace)))
  params = jax.device_get(tree.flatten(state.params))
  return Run(metrics, start, gradients[0], params)


def _assert_same(found, expected, rtol):
  """Each leaf's difference, relative to its size."""
  for name, a in expected.items():
    difference = np.linalg.norm(found[name] - a) / np.linalg.norm(a)
    assert difference < rtol, (name, difference)


def _assert_equal_runs(one, other, rtol):
  jax.tree.map(np.testing.assert_array_equal, one.start, other.start)
  for a, b in zip(one.metrics, other.metrics, strict=True):
    assert a == pytest.approx(b, rel=rtol)
  assert one.metrics[0]["loss"] != one.metrics[1]["loss"]
  _assert_same(other.gradient, one.gradient, rtol)
  _assert_same(other.params, one.params, rtol)
  for name, gradient in one.gradient.items():
    assert np.abs(gradient).max() > 0, name
    assert (one.params[name] != one.start[name]).any(), name


@pytest.mark.parametrize(
  ("make", "parts"), [(_autoencoder_config, 1), (_dit_config, 2)]
)
def test_sharded_equals_one_device(monkeypatch, make, parts):
  one = _run(monkeypatch, make() | {"mesh": {}})
  config = make() | {"mesh": MESH, "accumulate": parts}
  _assert_equal_runs(one, _run(monkeypatch, config, devices=8), 1e-5)


def test_parts_of_a_batch_equal_the_whole(monkeypatch, config):
  config["optim"] |= SGD
  one, *rest = (
    _run(monkeypatch, config | {"mesh": {"data": 2}, "accumulate": n}, 2)
    for n in (1, 2, 4)
  )
  for run in rest:
    # Rounding of float32 sums in another order: 1.1e-6 was seen.
    _assert_equal_runs(one, run, 3e-6)


def test_every_step_draws_anew(monkeypatch, config):
  """What the loss draws depends on the seed and the step, on nothing else."""
  config["optim"] |= SGD | {"lr": 0.0}
  batch = next(_batches(config, step.plan(config), 1))
  monkeypatch.setattr(f"{__name__}._batches", lambda *args: [batch, batch])
  one, again = (_run(monkeypatch, config, 8).metrics for _ in range(2))
  assert one == again
  losses = [metrics["loss"] for metrics in one]
  assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_a_batch_is_cut_where_it_lies():
  """Cutting moves nothing between devices."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = {"video": np.arange(48).reshape(16, 3)}

  with jax.set_mesh(mesh):
    placed = step.put(mesh, batch)
    compiled = jax.jit(lambda x: batch_parts.cut(x, 2)).lower(placed).compile()
    parts = compiled(placed)
  assert not re.search("all-|permute|collective", compiled.as_text())
  assert parts["video"].sharding.shard_shape((2, 8, 3)) == (2, 2, 3)
  np.testing.assert_array_equal(parts["video"][1], batch["video"][1::2])


@pytest.mark.parametrize(
  ("size", "parts", "message"),
  [
    (8, 1, None),
    (8, 2, None),
    (8, 4, "of the 4 devices that share a batch times 4 micro-batches"),
    (6, 1, "of the 4 devices that share a batch, found 6"),
    (8, 0, "accumulate must be positive"),
  ],
)
def test_what_batches_can_be_split(size, parts, message):
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  if message is None:
    step.require_divisible("batch_size", size, mesh, parts)
  else:
    with pytest.raises(errors.UserError, match=message):
      step.require_divisible("batch_size", size, mesh, parts)


def test_the_dit_is_split_over_both_axes(monkeypatch):
  monkeypatch.setattr(step, "TASKS", {**step.TASKS, "dit": _dit})
  run = step.plan(_dit_config() | {"mesh": MESH})
  specs = {
    name: leaf.sharding.spec
    for name, leaf in tree.flatten({"s": run.state, "f": run.frozen}).items()
  }
  split, whole = {}, set()
  for name, spec in specs.items():
    if any(spec):
      split[name.removeprefix("s/")] = tuple(spec)
    else:
      whole.add(name)
  blocks = "f/params/blocks"
  assert split[f"{blocks}/self_attn/q/kernel"] == (None, "fsdp", "tensor")
  assert split[f"{blocks}/cross_attn/v/bias"] == (None, "tensor")
  assert split[f"{blocks}/ffn/linear_2/kernel"] == (None, "tensor", "fsdp")
  assert split[f"{blocks}/self_attn/norm_q/scale"] == (None, "tensor")
  assert split["f/params/text_embed/linear_1/kernel"] == ("fsdp", "tensor")
  lora = "params/lora/blocks/self_attn"
  assert split[f"{lora}/k/a"] == (None, "fsdp", None)
  assert split[f"{lora}/k/b"] == (None, "fsdp", "tensor")
  assert split[f"{lora}/o/a"] == (None, "tensor", "fsdp")
  assert split[f"ema/{lora.removeprefix('params/')}/o/b"][2] == "fsdp"
  assert whole == {"s/step", *(n for n in whole if n.startswith("s/opt"))}


def test_the_state_is_split_over_the_mesh(config):
  run = step.plan(config)
  state, frozen = step.init(run)
  names = tree.flatten(state)
  assert {"params/mix/kernel", "ema/mix/kernel", "rng", "step"} <= set(names)
  for name, leaf in names.items():
    if name.endswith("kernel"):
      assert leaf.addressable_shards[0].data.size == leaf.size // 4, name
  assert any(
    n.startswith("opt/") and n.endswith("mu/mix/kernel") for n in names
  )
  assert tree.names(frozen) == ["mix/gain"]
  assert not any("gain" in name for name in names)


def test_the_state_is_donated_and_frozen_leaves_are_not(config):
  run = step.plan(config)
  (state, frozen), advance = step.init(run), step.compile_step(run, config)
  data = loop.batches(run, config["data"], 8, seed=0)
  with jax.set_mesh(run.mesh):
    advance(state, frozen, step.put(run.mesh, next(data)))
  data.close()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert float(frozen["mix"]["gain"]) == pytest.approx(0.9)


def _starting(config, shape, dtype="float32"):
  """The task "linear" from given values, its kernel of some shape and dtype."""
  found = step.TASKS["linear"](config)

  def start(where):
    kernel = jnp.full(shape, 0.5, dtype)
    values = {"mix": {"kernel": kernel, "gain": jnp.float32(2)}}
    return jax.tree.map(jax.device_put, values, where)

  return found._replace(start=start)


def test_a_task_starts_from_what_it_loads(config):
  run = step.plan(config)
  run = run._replace(task=_starting(config, (24, 24)))
  state, frozen = step.init(run)
  for leaves in (state.params, state.ema):
    np.testing.assert_array_equal(leaves["mix"]["kernel"], 0.5)
  kernel = state.params["mix"]["kernel"]
  assert kernel.sharding == run.state.params["mix"]["kernel"].sharding
  for found in (frozen, step.init_frozen(run)):
    assert jax.device_get(found) == {"mix": {"gain": 2.0}}


@pytest.mark.parametrize(
  ("shape", "dtype", "found"),
  [
    ((24, 8), "float32", r"\(24, 8, 'float32'\)"),
    ((24, 24), "bfloat16", r"\(24, 24, 'bfloat16'\)"),
  ],
)
def test_a_start_that_does_not_fit(config, shape, dtype, found):
  run = step.plan(config)._replace(task=_starting(config, shape, dtype))
  with pytest.raises(errors.UserError, match=found):
    step.init(run)


def test_frozen_leaves_are_the_same_after_a_restart(config):
  run = step.plan(config)
  one, other = step.init(run)[1], step.init_frozen(run)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_something_has_to_be_trained(config, monkeypatch):
  linear = step.TASKS["linear"]
  frozen = lambda c: linear(c)._replace(trainable=((".*", False),))  # noqa: E731
  monkeypatch.setattr(step, "TASKS", {"linear": frozen})
  with pytest.raises(errors.UserError, match="would train nothing"):
    step.plan(config)
