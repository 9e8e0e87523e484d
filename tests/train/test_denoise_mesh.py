"""Flow matching on a 2 x 4 mesh equals one device, draws included."""

import jax
import numpy as np

from configs import common
from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import denoise
from tests.adapt import runs, tiny_models

FIELDS = tiny_models.FIELDS["deep_i2v"] | {
  "width": 32,
  "heads": 4,
  "ffn_width": 32,
  "image_width": 8,
}


def step(mesh):
  """(loss, gradients of what trains by name) on the host."""
  task = denoise.denoise(runs.config("lora", "i2v", model=FIELDS))
  abstract = jax.eval_shape(task.init, jax.random.PRNGKey(0))
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
    found = jax.jit(jax.value_and_grad(loss_fn))(params, frozen, batch)
  loss, grads = jax.device_get(found)
  kernel = params["lora"]["blocks"]["self_attn"]["q"]["b"]
  return loss, tree.flatten(grads), kernel.sharding


def test_a_mesh_changes_nothing():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
  alone = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  loss, grads, where = step(mesh)
  expected, gradients, _ = step(alone)
  assert not where.is_fully_replicated
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert len(grads) == 2 * 9 + 5
  for name, value in gradients.items():
    scale = np.abs(value).max()
    assert scale > 0, name
    np.testing.assert_allclose(
      grads[name], value, rtol=0, atol=1e-5 * scale, err_msg=name
    )
