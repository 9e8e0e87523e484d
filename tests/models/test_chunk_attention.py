"""Attention in DC-AE-V: by hand, streamed, absent from released models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert, tree
from dcvideogen_jax.models import (
  bands,
  chunk_attention,
  dc_ae_v,
  rope,
  streaming,
)
from tests import golden_data, random_weights

CHUNK, HEADS, WIDTH = 2, 2, 12


@functools.cache
def block():
  """Returns a random block, its variables, and 3 chunks of 2x3 positions."""
  module = chunk_attention.ChunkAttention(HEADS, CHUNK)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3 * CHUNK, 2, 3, WIDTH)).astype(np.float32)
  return module, random_weights.of(module, x, scale=0.4), x


def apply(x):
  module, variables, _ = block()
  return np.asarray(random_weights.jitted(module)(variables, x)[0])


def test_by_hand():
  """Each chunk attends to itself and the one before, at first to zeros."""
  _, variables, x = block()
  p = jax.tree.map(np.asarray, variables["params"])

  def dense(name, x):
    return x @ p[name]["kernel"] + p[name]["bias"]

  y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  y = y * p["norm"]["scale"] + p["norm"]["bias"]
  n, e = CHUNK * 6, WIDTH // HEADS
  rotate = jax.jit(rope.rotate)
  angles = rope.angles((np.arange(2 * CHUNK), np.arange(2), np.arange(3)), e)
  parts = {
    name: dense(name, y).reshape(2, 3, n, HEADS, e) for name in ("q", "k", "v")
  }
  found = []
  for i in range(3):
    q = rotate(parts["q"][:, i], angles[n:])
    k, v = (
      np.concatenate(
        [parts[s][:, i - 1] if i else 0 * parts[s][:, 0], parts[s][:, i]], 1
      )
      for s in "kv"
    )
    logits = np.einsum("bnke,bmke->bknm", q, rotate(k, angles)) / e**0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    found.append(np.einsum("bknm,bmke->bnke", weights, v))
  expected = x + dense("out", np.stack(found, 1).reshape(x.shape))
  np.testing.assert_allclose(apply(x), expected, rtol=0, atol=2e-5)


def test_a_chunk_sees_itself_and_the_one_before():
  x = block()[2]
  before = apply(x)
  for i in range(3):
    other = x.copy()
    other[:, (i + 1) * CHUNK - 1] += 1
    changed = (apply(other) != before).any(axis=(0, 2, 3, 4))
    seen = [i <= j <= i + 1 for j in range(3)]
    assert [*changed] == [*np.repeat(seen, CHUNK)]


def test_it_begins_as_nothing():
  module, _, x = block()
  variables = jax.jit(module.init)(jax.random.key(1), x)
  assert set(variables) == {"params"}
  found = random_weights.jitted(module)(variables, x)[0]
  np.testing.assert_array_equal(found, x)


@functools.cache
def model(**changes):
  module = dc_ae_v.build(golden_data.SMALL, **{"attention_heads": 2, **changes})
  zeros = jax.ShapeDtypeStruct((1, 8, 8, 8, 3), np.float32)
  return module, random_weights.of(module, zeros, vectors=0.3)


def joined(parts):
  return np.concatenate([*map(np.asarray, parts)], axis=1)


@pytest.mark.parametrize(
  "plan",
  [bands.BandPlan(), bands.BandPlan(cut=2, rows=3, offload=True)],
  ids=str,
)
def test_streamed_equals_whole(plan):
  module, variables = model()
  rng = np.random.default_rng(2)
  x = rng.uniform(-1, 1, (1, 24, 16, 24, 3)).astype(np.float32)
  z = np.asarray(random_weights.jitted(module, "encode")(variables, x))
  y = np.asarray(random_weights.jitted(module, "decode")(variables, z))
  # The attention changes the result by more than rounding.
  plain = module.clone(attention_heads=0)
  other = random_weights.jitted(plain, "decode")(variables, z)
  assert np.abs(other - y).max() > 0.05 * np.abs(y).max()
  pieces = [x[:, i : i + 5] for i in range(0, 24, 5)]
  found = joined(streaming.encode(module, variables, pieces, plan=plan))
  np.testing.assert_allclose(found, z, rtol=0, atol=1e-5 * np.abs(z).max())
  for eager in (False, True):
    found = joined(
      streaming.decode(module, variables, [z], plan=plan, eager=eager)
    )
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_images_are_one_clip():
  module, variables = model()
  image = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3))
  encode = random_weights.jitted(module, "encode_image")
  z = encode(variables, image.astype(np.float32))
  again = random_weights.jitted(module, "decode_image")(variables, z)
  # Four equal frames, which no chunk divides: attention sees one latent frame.
  one = module.unchunked()
  clip = np.repeat(image.astype(np.float32)[:, None], 4, axis=1)
  expected = random_weights.jitted(one, "encode")(variables, clip)
  assert expected.shape[1] == 1
  np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5)
  expected = random_weights.jitted(one, "decode")(variables, z)[:, 0]
  np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)
  plain = module.clone(attention_heads=0)
  other = random_weights.jitted(plain, "decode_image")(variables, z)
  assert np.abs(other - again).max() > 0.05 * np.abs(again).max()


def test_released_models_have_none():
  for fields in dc_ae_v.VARIANTS.values():
    assert dc_ae_v.build(fields).attention_heads == 0
  module, variables = model(attention_heads=0)
  names, all_names = set(tree.names(variables)), set(tree.names(model()[1]))
  assert names < all_names
  last = f"stages_{len(module.widths) - 1}/op_list_{module.depths[-1]}"
  parts = [
    f"{x}/{y}" for x in ("q", "k", "v", "out") for y in ("kernel", "bias")
  ]
  assert all_names - names == {
    f"params/{half}/{last}/{part}"
    for half in ("encoder", "decoder")
    for part in [*parts, "norm/scale", "norm/bias"]
  }


def test_weights_go_there_and_back():
  module, variables = model()
  tensors = convert.to_torch("dc_ae_v", module, variables)
  assert any(name.endswith("main.out.weight") for name in tensors)
  config = convert.config_of(module)
  found, again = convert.load("dc_ae_v", tensors, config)
  assert found == module
  jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"attention_heads": -1}, "is -1, expected 0 or more"),
    ({"attention_heads": 7}, "no even multiple of 7 heads"),
    ({"time": "causal"}, "needs chunks"),
  ],
)
def test_fields_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    dc_ae_v.build(golden_data.SMALL, **{"attention_heads": 2, **changes})


def test_gradients():
  module, variables, x = block()
  loss = jax.jit(lambda v: jnp.square(module.apply(v, x)[0]).mean())
  gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(variables))
  leaves, structure = jax.tree.flatten(variables)
  names = tree.names(variables)
  assert len(gradients) == len(names) == 10
  for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
    # Along the gradient itself. The keys' bias has one only because the first
    # chunk sees zeros.
    length = np.linalg.norm(gradient)
    assert length > 1e-4, name
    ends = []
    for step in (0.01, -0.01):
      moved = leaves[i] + step * gradient / length
      changed = [*leaves[:i], moved, *leaves[i + 1 :]]
      ends.append(float(loss(jax.tree.unflatten(structure, changed))))
    slope = (ends[0] - ends[1]) / 0.02
    assert slope == pytest.approx(length, rel=0.01), name
