"""A step of an autoencoder on any mesh equals one device."""

import functools
import re

import jax
import numpy as np
import pytest

from dcvideogen_jax import sharding, tree
from dcvideogen_jax.train import step as step_lib

MODELS = {
  "autoencoder": {
    "latent_channels": 4,
    "widths": (8, 8, 8, 8),
    "depths": (0, 1, 1, 1),
    "chunk_frames": 4,
    "spatial_factor": 4,
    "temporal_factor": 2,
    "remat": True,
  },
  "wan_autoencoder": {
    "latent_channels": 4,
    "base_width": 16,
    "multipliers": (1, 1),
    "blocks": 1,
    "temporal": (True,),
    "mean": (0.0,) * 4,
    "std": (1.0,) * 4,
  },
}
ADVERSARIAL = {
  "phase": "adversarial_all",
  "lpips": {"net": "vgg", "frames": 2, "measure": None, "start": "random"},
  "discriminator": {
    "width": 8,
    "layers": 2,
    "spectral": True,
    "r1": 0.1,
    "lecam": 0.1,
  },
}

SMALLER = {
  "phase": "fast",
  "decoder": {"widths": (8, 4, 8, 8), "depths": (0, 1, 1, 1)},
}


@functools.cache
def step(task, adversarial=False, smaller=False, **axes):
  """(loss, metrics) and gradients by name, on the host, and the program."""
  count = int(np.prod(list(axes.values())))
  mesh = sharding.make_mesh(axes, jax.devices()[:count])
  loss = {"l1": 1.0}
  if task == "autoencoder":
    loss |= {"gradient": 0.5, "dssim": 0.5}
  if adversarial:
    loss = {"l1": 1.0, "lpips": 0.5, "gan": 0.5}
  if smaller:
    loss = {"l1": 1.0, "teacher": 0.5, "features": 0.5}
  task = step_lib.build_task(
    {
      "task": task,
      "start": "random",
      "weights": None,
      "model": MODELS[task],
      "loss": loss,
      **(ADVERSARIAL if adversarial else {}),
      **(SMALLER if smaller else {}),
    }
  )
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  where = sharding.shardings(shapes, mesh, [(".*", "fsdp")])
  batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  size = (8, 4, 16, 16, 3) if adversarial else (4, 4, 8, 24, 3)
  video = np.random.default_rng(0).integers(0, 256, size, np.uint8)

  def loss_fn(params, batch):
    return task.loss_fn(params, task.draw(batch, jax.random.key(5)))

  with jax.set_mesh(mesh):
    params = jax.jit(task.init, out_shardings=where)(jax.random.key(0))
    function = jax.jit(
      jax.value_and_grad(loss_fn, has_aux=True), in_shardings=(where, batch)
    )
    video = jax.device_put({"video": video}, batch)
    program = function.lower(params, video).compile()
    result, gradients = jax.device_get(program(params, video))
  return result, tree.flatten(gradients), program.as_text()


@pytest.mark.parametrize(
  ("task", "axes"),
  [
    pytest.param(
      "autoencoder", {"data": 2, "spatial": 4}, marks=pytest.mark.slow
    ),
    ("autoencoder", {"fsdp": 2, "context": 2, "spatial": 2}),
    ("wan_autoencoder", {"fsdp": 2, "spatial": 4}),
  ],
)
def test_a_mesh_changes_nothing(task, axes):
  result, gradients, program = step(task, **axes)
  expected, expected_gradients, _ = step(task, data=1)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, expected
  )
  assert len(gradients) > 30
  for name, value in expected_gradients.items():
    scale = np.abs(value).max()
    assert scale > 0, name
    np.testing.assert_allclose(
      gradients[name], value, rtol=0, atol=1e-5 * scale, err_msg=name
    )
  # No device has all columns of its clips where there are many.
  assert not re.findall(r"f32\[\d,\d,[48],(?:24|12),(?:8|16)\]", program)


@pytest.mark.slow
def test_a_mesh_changes_nothing_for_a_smaller_decoder():
  """With features whose columns are shared, and projections of them."""
  (loss, metrics), gradients, _ = step(
    "autoencoder", smaller=True, fsdp=2, spatial=4
  )
  (expected, other), expected_gradients, _ = step(
    "autoencoder", smaller=True, data=1
  )
  assert loss == pytest.approx(expected, rel=1e-5)
  for name, value in other.items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
  learning = set()
  for name, value in expected_gradients.items():
    scale = np.abs(value).max()
    if scale:
      learning.add(name.split("/")[0])
    np.testing.assert_allclose(
      gradients[name], value, rtol=0, atol=1e-5 * scale, err_msg=name
    )
  # Branches that are silent at first have no gradient inside.
  assert (
    {"decoder", "projections"}
    <= learning
    <= {"decoder", "projections", "encoder"}
  )


@pytest.mark.parametrize(
  "axes",
  [
    {"data": 2, "fsdp": 4},
    pytest.param({"fsdp": 2, "spatial": 4}, marks=pytest.mark.slow),
  ],
)
def test_a_mesh_changes_nothing_between_two_players(axes):
  """With LPIPS and every option of the discriminator.

  The norms that weigh the adversarial term are those of all devices.
  """
  (loss, metrics), gradients, _ = step("autoencoder", adversarial=True, **axes)
  (expected, other), expected_gradients, _ = step(
    "autoencoder", adversarial=True, data=1
  )
  assert loss == pytest.approx(expected, rel=1e-5)
  assert metrics.keys() == other.keys()
  for name, value in other.items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
  for name, value in expected_gradients.items():
    scale = np.abs(value).max()
    # A vector of one number is always 1.
    still = name.startswith("lpips_") or name.endswith("/logits/u")
    assert scale > 0 or still, name
    np.testing.assert_allclose(
      gradients[name], value, rtol=0, atol=2e-5 * scale, err_msg=name
    )
