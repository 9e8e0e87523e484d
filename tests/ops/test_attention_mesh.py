"""Attention split over samples, heads and tokens equals that of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import api, splash

HEADS, E = 8, 4


def _inputs(b, n, m, heads=HEADS, e=E):
  rng = np.random.default_rng(n * m)
  return [
    jnp.asarray(rng.normal(size=(b, size, heads, e)), jnp.float32)
    for size in (n, m, m)
  ]


def _found(keys, weights, *inputs):
  """Returns the output and the gradients of its weighted sum."""

  def total(q, k, v):
    names = ("tokens", keys, keys)
    q, k, v = (
      sharding.constrain(x, "batch", name, "hidden")
      for x, name in zip((q, k, v), names, strict=True)
    )
    y = attention.sharded_attention(
      q, k, v, keys=keys, implementation="reference"
    )
    y = sharding.constrain(y, "batch", "tokens", "hidden")
    return (y * weights).sum(), y

  function = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
  (_, y), gradients = jax.jit(function)(*inputs)
  return y, *gradients


@pytest.mark.parametrize(
  "axes",
  [
    {"context": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "tensor": 2, "context": 2},
    {"context": 4, "spatial": 2},
  ],
)
# Self-attention over tokens that do and do not divide, and cross-attention.
@pytest.mark.parametrize(
  ("b", "n", "m", "keys"),
  [(8, 16, 16, "tokens"), (3, 13, 13, "tokens"), (3, 13, 5, None)],
)
def test_a_mesh_changes_nothing(axes, b, n, m, keys):
  inputs = _inputs(b, n, m)
  weights = jnp.asarray(
    np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32
  )
  expected = _found(keys, weights, *inputs)
  with jax.set_mesh(sharding.make_mesh(axes)):
    found = _found(keys, weights, *inputs)
  for a, x in zip(expected, found, strict=True):
    np.testing.assert_allclose(x, a, rtol=1e-5, atol=1e-6)


def _collectives(keys):
  """Counts the collectives of a program for sharded tokens."""
  mesh = sharding.make_mesh({"tensor": 2, "context": 4})
  q, k, v = (
    jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=jax.sharding.NamedSharding(
        mesh, sharding.activation_spec(mesh, "batch", name, "hidden")
      ),
    )
    for x, name in zip(_inputs(1, 16, 16), ("tokens", keys, keys), strict=True)
  )
  with jax.set_mesh(mesh):
    function = jax.jit(
      functools.partial(attention.sharded_attention, keys=keys)
    )
    text = function.lower(q, k, v).compile().as_text()
  names = re.findall(
    r" (all-\w+(?:-\w+)?|collective-\w+|reduce-scatter)\(", text
  )
  return {name: names.count(name) for name in names}


def test_only_heads_and_tokens_are_exchanged():
  assert _collectives("tokens") == {"all-to-all": 4}
  assert _collectives(None) == {}


def test_heads_that_the_devices_do_not_divide():
  q, k, v = _inputs(1, 8, 8, heads=12)
  mesh = sharding.make_mesh({"tensor": 2, "context": 4})
  attend = functools.partial(attention.sharded_attention, q, k, v)
  with jax.set_mesh(mesh):
    with pytest.raises(
      errors.UserError, match="12 attention heads .* tensor 2 x context 4"
    ):
      attend(keys="tokens")
    # Without an exchange, devices along "context" have all heads.
    assert jax.eval_shape(lambda: attend(keys=None)).shape == q.shape


def test_heads_that_every_device_has():
  """A single head, as in Wan's autoencoder, is not split along "tensor"."""
  inputs = _inputs(3, 13, 5, heads=1)

  def found(*inputs):
    def loss(*inputs):
      out = attention.sharded_attention(*inputs, keys=None, heads=None)
      return (out**2).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)

  alone = jax.jit(found)(*inputs)
  axes = {"data": 2, "tensor": 2, "context": 2}
  with jax.set_mesh(sharding.make_mesh(axes)):
    split = jax.jit(found)(*inputs)
  for a, b in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_each_device_runs_the_kernel(monkeypatch):
  """The compiler cannot partition the kernel; 130 tokens take two blocks."""
  blocks = splash.Blocks(128, 128, 128, 128, 128)
  kernel = functools.partial(splash.splash, blocks=blocks, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "splash", kernel)
  inputs = _inputs(1, 130, 130, heads=2, e=8)
  expected = attention.attention(*inputs, implementation="reference")
  attend = functools.partial(
    attention.sharded_attention, keys="tokens", implementation="splash"
  )
  with jax.set_mesh(sharding.make_mesh({"context": 2}, jax.devices()[:2])):
    found = jax.jit(attend)(*inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
