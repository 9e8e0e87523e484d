"""On a mesh, each device runs the attention kernel on its own part."""

import jax
import numpy as np
import pytest

from dcvideogen_jax import sharding
from dcvideogen_jax.models import clip_vision, wan_vae_layers
from dcvideogen_jax.ops.attention import api, reference
from tests import random_weights


@pytest.mark.parametrize(
  ("module", "shape"),
  [
    (clip_vision.Attention(3, None, {}), (2, 9, 12)),
    (wan_vae_layers.Attention({}), (1, 3, 4, 5, 8)),
  ],
  ids=["clip_vision", "wan_vae"],
)
@pytest.mark.parametrize("axes", [{"tensor": 2, "context": 2}, {"fsdp": 4}])
def test_each_device_computes_its_own_part(monkeypatch, module, shape, axes):
  """The compiler does not partition a Pallas kernel over a mesh."""
  manual = []

  def kernel(q, k, v, mask=None):
    manual.append({*axes} <= {*jax.sharding.get_abstract_mesh().manual_axes})
    return reference.reference(q, k, v, mask)

  monkeypatch.setitem(api.IMPLEMENTATIONS, "reference", kernel)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  variables = random_weights.of(module, x)
  apply = jax.jit(module.apply)
  expected = apply(variables, x)
  manual.clear()
  mesh = sharding.make_mesh(axes, jax.devices()[:4])
  with jax.set_mesh(mesh):
    found = apply(variables, x)
  assert manual == [True]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
