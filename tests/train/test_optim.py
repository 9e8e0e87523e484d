"""Schedules, decay masks and the average of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.train import optim


@pytest.fixture
def options(config):
  return config["optim"] | {"lr": 0.1, "warmup": 10}


def test_cosine_with_warmup(options):
  schedule = optim.learning_rate(options, 110)
  found = [float(schedule(n)) for n in (0, 5, 10, 60, 110, 200)]
  expected = [0, 0.05, 0.1, 0.055, 0.01, 0.01]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_constant_after_warmup(options):
  schedule = optim.learning_rate(options | {"schedule": "constant"}, 100)
  np.testing.assert_allclose([schedule(n) for n in (10, 99)], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
  "change",
  [
    {"schedule": "linear"},
    {"warmup": 101},
    {"warmup": -1},
    {"name": "lion"},
    {"decay_mask": (("a", True),)},
    {"decay_mask": (("(", True),)},
    {"lr_scale": (("a", 0.5),)},
    {"lr_scale": (("c", 0.5), (".*", 1.0))},
    {"lr_scale": (("(", 0.5), (".*", 1.0))},
  ],
)
def test_what_does_not_fit(options, change):
  with pytest.raises(errors.UserError):
    optim.build(options | change, 100).init({"a": jnp.zeros(2), "b": 0.0})


def test_only_masked_parameters_decay(options):
  rng = np.random.default_rng(0)
  params = {"kernel": rng.random(3, np.float32), "bias": rng.random(3)}
  options |= {"decay": 0.5, "warmup": 0, "schedule": "constant"}
  optimiser = optim.build(options, 100)
  zeros = jax.tree.map(jnp.zeros_like, params)
  update, _ = optimiser.update(zeros, optimiser.init(params), params)
  np.testing.assert_allclose(
    update["kernel"], -0.1 * 0.5 * params["kernel"], rtol=1e-6
  )
  np.testing.assert_array_equal(update["bias"], 0)


def test_a_scaled_learning_rate_is_another_learning_rate(options):
  """As AdamW with rates of their own; clipping is by the norm of all."""
  rng = np.random.default_rng(0)
  params = {
    "head": {"bias": rng.random(3, np.float32)},
    "block": {"kernel": rng.random((2, 3), np.float32)},
    "other": {"bias": rng.random(4, np.float32)},
  }
  options |= {"warmup": 2, "decay": 0.5, "decay_mask": ((".*", True),)}
  scales = {"head": 10.0, "block": 0.25, "other": 1.0}
  rules = (("head/.*", 10.0), (".*kernel", 0.25), (".*", 1.0))
  optimiser = optim.build(options | {"lr_scale": rules}, 20)
  schedule = optim.learning_rate(options, 20)

  def adamw(scale):
    rate = lambda n: scale * schedule(n)  # noqa: E731
    return optax.adamw(rate, *options["betas"], weight_decay=0.5)

  expected = optax.chain(
    optax.clip_by_global_norm(options["clip"]),
    optax.multi_transform(
      {name: adamw(scale) for name, scale in scales.items()},
      {
        name: jax.tree.map(lambda _, n=name: n, x) for name, x in params.items()
      },
    ),
  )
  plain = optim.build(options, 20).init(params)
  states = optimiser.init(params), expected.init(params)
  assert tree.names(states[0]) == tree.names(plain)
  ours = theirs = params
  for _ in range(4):
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    one, other = (
      optimiser.update(gradient, states[0], ours),
      expected.update(gradient, states[1], theirs),
    )
    states = one[1], other[1]
    ours = optax.apply_updates(ours, one[0])
    theirs = optax.apply_updates(theirs, other[0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs
  )


@pytest.mark.parametrize(("clip", "norm"), [(0.5, 0.5), (0, 5.0)])
def test_clipping_by_global_norm(options, clip, norm):
  options |= {"name": "sgd", "clip": clip, "lr": 1.0, "warmup": 0, "decay": 0.0}
  optimiser = optim.build(options | {"schedule": "constant"}, 10)
  gradient = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}
  update, _ = optimiser.update(gradient, optimiser.init(gradient), gradient)
  np.testing.assert_allclose(
    np.hypot(update["kernel"], update["bias"]), norm, rtol=1e-5
  )


@pytest.mark.parametrize(
  ("ramp", "decays"),
  [
    ("ratio", [0.1, 0.5, 0.9]),
    # 0.9 (1 - exp(-n / 20)) for the updates 1, 9 and 1001
    ("exponential", [0.0438935, 0.3261347, 0.9]),
  ],
)
def test_average_warms_up_and_then_decays(ramp, decays):
  average = optim.ema({"decay": 0.9, "ramp": ramp, "steps": 20})
  ema, params = {"a": jnp.float32(2.0)}, {"a": jnp.float32(1.0)}
  found = [float(average(ema, params, jnp.int32(n))["a"]) for n in (0, 8, 1000)]
  np.testing.assert_allclose(found, np.add(decays, 1), rtol=1e-6)


@pytest.mark.parametrize(
  "change", [{"ramp": "linear"}, {"decay": 1.0}, {"steps": 0}]
)
def test_an_average_that_does_not_fit(config, change):
  with pytest.raises(errors.UserError, match="ema"):
    optim.ema(config["ema"] | change)


def test_no_average_without_a_decay(config):
  assert optim.ema(None) is None
  assert optim.ema(config["ema"] | {"decay": 0.0}) is None
