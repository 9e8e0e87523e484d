"""Flow matching on any mesh equals one device, draws included."""

import re

import jax
import numpy as np
import pytest

from configs import common
from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import denoise
from tests.adapt import runs, tiny_models

FIELDS = tiny_models.FIELDS["deep_i2v"] | {
  "width": 96,
  "heads": 12,
  "ffn_width": 48,
  "image_width": 8,
}


def step(mesh, phase="lora", **changes):
  """(loss, gradients of what trains by name) on the host, and the program."""
  config = runs.config(phase, "i2v", model=FIELDS, **changes)
  task = denoise.denoise(config)
  abstract = jax.eval_shape(task.init, jax.random.key(0))
  variables = tiny_models.random(abstract)
  where = sharding.shardings({"params": abstract}, mesh, common.DIT_SHARDING)[
    "params"
  ]
  variables = jax.device_put(variables, where)
  trains = tree.match_tree(task.trainable, abstract)
  params, frozen = tree.split(variables, trains)
  clips = runs.batch(8, "i2v")
  clips["image"] = clips["image"][..., :8]
  batch = jax.device_put(
    clips,
    jax.sharding.NamedSharding(mesh, sharding.BATCH),
  )

  def loss_fn(params, frozen, batch):
    drawn = task.draw(batch, jax.random.key(5))
    return task.loss_fn(tree.merge(params, frozen), drawn)[0]

  with jax.set_mesh(mesh):
    function = jax.jit(jax.value_and_grad(loss_fn))
    program = function.lower(params, frozen, batch).compile()
  loss, grads = jax.device_get(program(params, frozen, batch))
  kind, name = ("lora", "a") if phase == "lora" else ("params", "kernel")
  q = params[kind]["blocks"]["self_attn"]["q"][name]
  parts = mesh.shape["fsdp"] * mesh.shape["context"]
  assert q.sharding.shard_shape(q.shape)[1] == q.shape[1] // parts
  return loss, tree.flatten(grads), program.as_text()


@pytest.fixture(scope="module")
def alone():
  return step(sharding.make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
  "axes",
  [
    *(
      pytest.param(axes, marks=pytest.mark.slow)
      for axes in ({"data": 8}, {"fsdp": 4}, {"tensor": 4}, {"context": 3})
    ),
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 2, "context": 3},  # Of 8 tokens the last device has 2.
    {"data": 2, "tensor": 2, "context": 2},
  ],
)
def test_a_mesh_changes_nothing(alone, axes):
  count = int(np.prod(list(axes.values())))
  mesh = sharding.make_mesh(axes, jax.devices()[:count])
  expected, gradients, _ = alone
  loss, grads, program = step(mesh)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert len(grads) == 2 * 9 + 5
  for name, value in gradients.items():
    scale = np.abs(value).max()
    assert scale > 0, name
    np.testing.assert_allclose(
      grads[name], value, rtol=0, atol=1e-5 * scale, err_msg=name
    )
  if axes.keys() - {"tensor"}:
    # No device computes all 8 tokens of all 8 samples, but attends to them.
    widths = "96" if "context" in axes else r"\d+"
    assert not re.findall(rf"f32\[8,8,{widths}\]", program)


@pytest.mark.parametrize("phase", ["lora", "full"])
def test_devices_add_up_float32(phase):
  """No gradient is rounded to half precision before it is summed."""
  mesh = sharding.make_mesh({"fsdp": 8})
  _, gradients, _ = step(mesh, phase, dtype="bfloat16")
  for name, value in gradients.items():
    assert value.dtype == np.float32
    rounded = value.astype(jax.numpy.bfloat16).astype(np.float32)
    assert (rounded != value).mean() > 0.5, name
