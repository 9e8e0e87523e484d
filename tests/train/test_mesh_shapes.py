"""A checkpoint of one mesh is restored onto any other, bit for bit."""

import grain
import jax
import numpy as np
import pytest

from configs import common
from dcvideogen_jax import checkpoint, tree
from dcvideogen_jax.train import step
from tests.adapt import runs, tiny_models

FIELDS = tiny_models.FIELDS["deep_i2v"] | {
  "width": 32,
  "heads": 4,
  "ffn_width": 32,
  "image_width": 8,
}


def _plan(sizes):
  """A run of the LoRA phase on as many devices as the sizes ask for."""
  config = runs.config("lora", "i2v", model=FIELDS)
  config |= common.training().to_dict() | {"steps": 100, "mesh": sizes}
  config |= {"sharding": common.DIT_SHARDING}
  return step.plan(config, jax.devices()[: int(np.prod(list(sizes.values())))])


def _filled(abstract):
  """Random bits in every leaf, in the leaves' shardings."""
  rng = np.random.default_rng(0)

  def fill(x):
    value = rng.normal(size=x.shape)
    if np.issubdtype(x.dtype, np.integer):
      value = rng.integers(0, 2**31, x.shape)
    return jax.device_put(value.astype(x.dtype), x.sharding)

  return jax.tree.map(fill, abstract)


MIXED = {"fsdp": 2, "tensor": 2, "context": 2}


@pytest.mark.parametrize(
  ("saved", "restored"),
  [
    (MIXED, {"data": 1}),
    ({"data": 2, "spatial": 4}, {"tensor": 4, "context": 2}),
    *(
      pytest.param(*meshes, marks=pytest.mark.slow)
      for meshes in (
        (MIXED, {"data": 2, "context": 4}),
        (MIXED, {"fsdp": 4, "tensor": 2}),
        ({"data": 1}, MIXED),
      )
    ),
  ],
)
def test_restoring_onto_another_mesh_changes_no_bit(tmp_path, saved, restored):
  state = _filled(_plan(saved).state)
  position = grain.MapDataset.range(4).to_iter_dataset()
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(1, state, iter(position))
    target = _plan(restored).state
    found = saver.restore(target).state
  leaves, wanted = tree.flatten(found), tree.flatten(target)
  assert any(name.startswith("opt/") for name in leaves)
  for name, expected in tree.flatten(state).items():
    np.testing.assert_array_equal(leaves[name], expected, err_msg=name)
    where = wanted[name].sharding
    assert leaves[name].sharding.is_equivalent_to(where, expected.ndim), name
  lora = leaves["params/lora/blocks/self_attn/q/a"]
  parts = lora.size // lora.addressable_shards[0].data.size
  # Along "tensor" each device has all of it.
  assert parts == restored.get("fsdp", 1) * restored.get("context", 1)
