"""The alignment task: its start, its loss, and that it aligns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcvideogen_jax import convert, errors, tree
from dcvideogen_jax.adapt import align as align_lib
from dcvideogen_jax.train import align
from tests.adapt import runs, tiny_models


def anywhere(task):
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  return jax.tree.map(lambda _: where, abstract)


@pytest.mark.parametrize("layout", ["diffusers", "original", None])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_teacher_is_the_bases_patch_embedding(tmp_path, kind, layout):
  module = tiny_models.module(f"base_{kind}", image_width=None)
  if kind == "i2v" and layout != "original":
    module = tiny_models.module("base_i2v")
  variables = tiny_models.variables(module)
  convert.save(tmp_path, "wan_dit", module, variables, layout=layout)
  task = align.align(
    runs.config("embed", kind, **runs.started("embed", base=tmp_path))
  )
  found = task.start(anywhere(task))
  assert sorted(tree.names(found)) == [
    "params/patch_embed/bias",
    "params/patch_embed/kernel",
    "teacher/patch_embed/bias",
    "teacher/patch_embed/kernel",
  ]
  for name, value in found["teacher"]["patch_embed"].items():
    expected = variables["params"]["patch_embed"][name]
    np.testing.assert_array_equal(value, expected)
  student = found["params"]["patch_embed"]["kernel"]
  assert student.shape == (1, 1, 1, 6 if kind == "t2v" else 16, 16)
  assert np.abs(student).min() > 0


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_loss_and_measure_by_hand(kind):
  task = align.align(runs.config("embed", kind))
  variables = jax.jit(task.init)(jax.random.key(0))
  batch = runs.batch(kind=kind)
  loss, metrics = jax.jit(task.loss_fn)(variables, batch)

  def tokens(where, space, patch):
    x = batch[space]
    if kind == "i2v":
      mask = np.zeros((*x.shape[:-1], 4), np.float32)
      mask[:, 0] = 1
      x = np.concatenate([x, mask, batch[f"{space}_condition"]], axis=-1)
    kernel, bias = (
      np.asarray(variables[where]["patch_embed"][name], np.float64)
      for name in ("kernel", "bias")
    )
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // patch, patch, w // patch, patch, c)
    return np.einsum("bthpwqc,pqcd->bthwd", x, kernel[0]) + bias

  student, teacher = tokens("params", "deep", 1), tokens("teacher", "base", 2)
  teacher = teacher.reshape(4, 2, 2, 2, 2, 2, -1).mean((3, 5))
  expected = np.square(student - teacher).mean((1, 2, 3, 4))
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["align_mse"], expected.mean(), rtol=1e-5)
  found = jax.jit(task.predict_fns["measure"])(variables, batch)
  np.testing.assert_allclose(found["align_mse"], expected, rtol=1e-5)
  variance = teacher.var((1, 2, 3)).mean(-1)
  np.testing.assert_allclose(
    found["align_relative"], expected / variance, rtol=1e-4
  )


def test_another_loss_is_measured_alike():
  batch = runs.batch()
  tasks = [
    align.align(runs.config("embed", align={"loss": x, "upsample": "linear"}))
    for x in ("pool", "upsample")
  ]
  variables = jax.jit(tasks[0].init)(jax.random.key(0))
  (pool, measured), (up, same) = (
    jax.jit(task.loss_fn)(variables, batch) for task in tasks
  )
  np.testing.assert_allclose(pool, measured["align_mse"], rtol=1e-6)
  np.testing.assert_array_equal(measured["align_mse"], same["align_mse"])
  assert abs(up - pool) > 0.01


def test_it_aligns_what_can_be_aligned():
  """Deep latents that hold the base's averages, and noise in other channels."""
  task = align.align(runs.config("embed"))
  variables = jax.jit(task.init)(jax.random.key(0))
  batch = runs.batch(64)
  pooled = align_lib.pool(batch["base"], (2, 2, 2))
  batch["deep"][..., :4] = 2 * pooled - 1
  # A kernel that is the same for all pixels of a patch sees averages only.
  kernel = variables["teacher"]["patch_embed"]["kernel"]
  variables["teacher"]["patch_embed"]["kernel"] = jnp.broadcast_to(
    kernel[:, :1, :1], kernel.shape
  )
  optimiser = optax.adam(3e-2, 0.9, 0.9)

  def loss(params):
    return task.loss_fn({**variables, "params": params}, batch)[0]

  def step(carry, _):
    params, state = carry
    updates, state = optimiser.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    carry = params, optimiser.init(params)
    return jax.lax.scan(step, carry, None, 400)[0][0]

  measure = jax.jit(task.predict_fns["measure"])
  before = measure(variables, batch)["align_relative"].mean()
  params = train(variables["params"])
  after = measure({**variables, "params": params}, batch)
  assert before > 1 > 0.01 > after["align_relative"].mean()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (runs.started("embed"), "phase embed starts from one of base"),
    (runs.started("embed", weights="x"), "found weights"),
    (
      {"model": tiny_models.FIELDS["deep_t2v"] | {"width": 8}},
      "differ in width",
    ),
  ],
)
def test_configs_that_make_no_sense(changes, message):
  with pytest.raises(errors.UserError, match=message):
    align.align(runs.config("embed") | changes)


def test_a_base_that_is_not_the_one_described(tmp_path):
  module = tiny_models.module("base_t2v", in_channels=5)
  convert.save(tmp_path, "wan_dit", module, tiny_models.variables(module))
  start = runs.started("embed", base=tmp_path)
  task = align.align(runs.config("embed", **start))
  with pytest.raises(errors.UserError, match="shape of patch_embedding"):
    task.start(anywhere(task))
