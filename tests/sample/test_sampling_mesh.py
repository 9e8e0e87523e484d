"""Sampling on several devices equals sampling on one."""

import jax
import numpy as np
import pytest

from configs import common
from dcvideogen_jax import config_parts, errors, memory
from dcvideogen_jax.models import bands
from dcvideogen_jax.sample import chunkwise, pipeline, placement
from tests.sample import small

# Latents have 45 tokens and 5 columns, which no mesh divides.
FIELDS = {"heads": 4}


def spread(made, weights=("fsdp",), **sizes):
  """Places the pipeline on a mesh."""
  layout = placement.layout(sizes, config_parts.sample_sharding(*weights))
  parts = placement.placed(made.parts, layout)
  return pipeline.DCVideoGen(parts, layout=layout)


@pytest.fixture(scope="module")
def t2v():
  made = small.make(**FIELDS)
  return made, small.run(made)


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2},
    {"fsdp": 2},
    {"tensor": 2},
    {"context": 4},
    {"spatial": 2},
    {"data": 2, "tensor": 2, "context": 2},
  ],
)
def test_a_mesh_changes_nothing(t2v, sizes):
  made, expected = t2v
  found = small.run(spread(made, **sizes))
  assert len(found.latents.sharding.device_set) == np.prod(list(sizes.values()))
  np.testing.assert_allclose(
    found.latents, expected.latents, rtol=1e-5, atol=1e-5
  )
  if "spatial" in sizes:
    # Rounded from floats that differ in their last bits.
    difference = found.video().astype(int) - expected.video()
    assert np.abs(difference).max() <= 1 and (difference == 0).mean() > 0.99


def test_a_budget_is_that_of_one_device(t2v, monkeypatch):
  made, _ = t2v
  devices, plan = [], bands.plan

  def spy(*args, **kwargs):
    devices.append(kwargs["devices"])
    return plan(*args, **kwargs)

  monkeypatch.setattr(bands, "plan", spy)
  for sizes in {"spatial": 2}, {"context": 2, "spatial": 2}, {"data": 2}:
    small.run(spread(made, **sizes)).video()
  assert devices == [2, 4, 1]


def test_image_to_video_on_all_axes_but_one():
  """With texts, images and conditions, and weights split over two axes."""
  made = small.make("i2v", texts=True, **FIELDS)
  given = {"prompt": "a cat", "negative_prompt": "bad", "image": small.PHOTO}
  expected = small.run(made, **given, one_program=True)
  other = spread(made, ("fsdp", "context"), data=2, context=2, spatial=2)
  kernel = other.parts.transformer.variables["params"]["blocks"]["ffn"]
  kernel = kernel["linear_1"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
  found = small.run(other, **given, one_program=True)
  np.testing.assert_allclose(
    found.latents, expected.latents, rtol=1e-5, atol=1e-5
  )


def test_weights_go_where_the_rules_say(t2v):
  made = spread(t2v[0], tensor=2, data=2)
  parts = made.parts
  heads = parts.transformer.variables["params"]["blocks"]["self_attn"]["q"]
  kernel = heads["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // 2
  leaves = jax.tree.leaves(parts.space.variables)
  assert all(leaf.sharding.is_fully_replicated for leaf in leaves)


def test_a_single_device_needs_no_layout():
  assert placement.layout(common.mesh(), ()) is None
  with pytest.raises(errors.UserError, match="needs 16 devices, found 8"):
    placement.layout(common.mesh(data=16), ())


def test_samples_that_the_mesh_does_not_share(t2v):
  made = spread(t2v[0], data=4)
  with pytest.raises(errors.UserError, match="4 devices.*found 2"):
    small.run(made)
  with pytest.raises(errors.UserError, match="4 devices.*found 1"):
    small.run(made, batched=False)


def test_processes_with_nothing_to_do(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(errors.UserError, match="2 of the 8 devices"):
    placement.layout(common.mesh(context=2), ())


STREAM = {
  "negative_prompt": small.NEGATIVE,
  "frames": 32,
  "window": 2,
  "steps": 1,
  "height": 10,
  "width": 18,
}


@pytest.mark.parametrize(
  "sizes",
  [{"data": 2}, {"tensor": 2}, {"context": 4}, {"context": 2, "spatial": 2}],
)
def test_a_stream_on_a_mesh(sizes, monkeypatch):
  """Four chunks of 30 tokens, each after at most two others."""
  made = small.make(chunk=2, **FIELDS)
  expected = [*made.generate_stream(small.TEXT, **STREAM).latents()]
  kept, add = [], chunkwise.KVCache.add

  def spy(self, chunk):
    kept.append(chunk)
    add(self, chunk)

  monkeypatch.setattr(chunkwise.KVCache, "add", spy)
  found = spread(made, **sizes).generate_stream(small.TEXT, **STREAM)
  for x, y in zip(found.latents(), expected, strict=True):
    assert len(x.sharding.device_set) == np.prod(list(sizes.values()))
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert len(kept) == 3
  # Two samples, as guidance doubles the batch, and four heads.
  heads = 4 // (sizes.get("tensor", 1) * sizes.get("context", 1))
  local = (2, 2 // sizes.get("data", 1), 30, heads, 6)
  for x in jax.tree.leaves(kept):
    assert x.sharding.shard_shape(x.shape) == local


def test_keys_and_values_are_counted_once_over_a_mesh(monkeypatch):
  made = spread(small.make(chunk=2, **FIELDS), tensor=2)
  # Bytes of a chunk on a device: 2 layers, 12 of 24 channels, 30 tokens, both
  # branches, keys and values, float32.
  chunk = 2 * 12 * 30 * 2 * 2 * 4
  for free, message in ((2.9, "of 3 chunks take"), (3.1, "does not fit")):
    monkeypatch.setattr(memory, "free_on_all", lambda n=free: n * chunk / 0.85)
    with pytest.raises(errors.UserError, match=message):
      next(made.generate_stream(small.TEXT, **STREAM).chunks())
