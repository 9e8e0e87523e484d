"""Arguments of cuDNN's attention, which needs a GPU to run.

A stand-in refuses the same as jax's function: gradients for odd numbers of
queries or keys. Rows beyond the given lengths are NaN in its results.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import sharding
from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import BlockCausal, api, masks

HEADS, E = 4, 8


@pytest.fixture
def calls(monkeypatch):
  """Returns for each call queries, keys, and whether lengths were given."""
  found = []

  def attend(
    q,
    k,
    v,
    *,
    implementation,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
  ):
    assert implementation == "cudnn" and q.dtype == jnp.bfloat16
    lengths = query_seq_lengths, key_value_seq_lengths
    found.append((q.shape[1], k.shape[1], lengths != (None, None)))
    if lengths == (None, None):
      lengths = tuple(jnp.full(len(x), x.shape[1], jnp.int32) for x in (q, k))
    assert all(x.shape == (len(q),) and x.dtype == jnp.int32 for x in lengths)
    return _stand_in(q, k, v, *lengths)

  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  return found


def _there(x, length):
  """Tells which tokens of `x` are within the length, `b n`."""
  return jnp.arange(x.shape[1])[None] < length[:, None]


def _exact(q, k, v, queries, keys):
  """Attention within the lengths, in float32; other rows are NaN."""
  float32 = [x.astype(jnp.float32) for x in (q, k, v)]
  logits = jnp.einsum("bnke,bmke->bknm", *float32[:2]) / q.shape[-1] ** 0.5
  seen = _there(k, keys)[:, None, None]
  weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
  out = jnp.einsum("bknm,bmke->bnke", weights, float32[2])
  return jnp.where(_there(q, queries)[..., None, None], out, jnp.nan).astype(
    v.dtype
  )


@jax.custom_vjp
def _stand_in(q, k, v, queries, keys):
  return _exact(q, k, v, queries, keys)


def _forward(q, k, v, queries, keys):
  if q.shape[1] % 2 or k.shape[1] % 2:
    raise NotImplementedError(
      f"Unsupported sequence length Q {q.shape[1]}, KV {k.shape[1]}."
    )
  return _exact(q, k, v, queries, keys), (q, k, v, queries, keys)


def _backward(saved, dout):
  q, k, v, queries, keys = saved
  attend = functools.partial(_exact, queries=queries, keys=keys)
  gradients = jax.vjp(attend, q, k, v)[1](
    jnp.where(_there(q, queries)[..., None, None], dout, 0)
  )
  lengths = queries, keys, keys
  found = (
    jnp.where(_there(x, length)[..., None, None], x, jnp.nan)
    for x, length in zip(gradients, lengths, strict=True)
  )
  return *found, None, None


_stand_in.defvjp(_forward, _backward)


def _inputs(n, m, b=2):
  random = np.random.default_rng(n * m)
  return [
    jnp.asarray(random.normal(size=(b, size, HEADS, E)), jnp.bfloat16)
    for size in (n, m, m)
  ]


def _found(function, inputs):
  """Returns the output and gradients of its weighted sum, in float32."""
  weights = np.random.default_rng(0).normal(size=inputs[0].shape)
  weights = jnp.asarray(weights, jnp.float32)

  def loss(*inputs):
    out = function(*inputs)
    return (out.astype(jnp.float32) * weights).sum(), out

  grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  gradients, out = jax.jit(grad)(*inputs)
  assert out.dtype == jnp.bfloat16
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


def _check(attend, inputs, mask=None, reference=None):
  """Compares with the reference; bfloat16 has eight bits, sums reach ten."""
  reference = reference or functools.partial(
    attention.attention, mask=mask, implementation="reference"
  )
  expected = _found(reference, inputs)
  for mine, right in zip(_found(attend, inputs), expected, strict=True):
    np.testing.assert_allclose(mine, right, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize(
  ("n", "m", "handed"),
  [
    (6, 5, (6, 6, True)),  # An odd number of keys, as the 257 of CLIP.
    (5, 6, (6, 6, True)),
    (7, 7, (8, 8, True)),  # Odd numbers of both, as 375 tokens of latents.
    (1, 1, (2, 2, True)),
    (6, 4, (6, 4, False)),  # Even numbers need no padding and no lengths.
  ],
)
def test_odd_numbers_of_tokens(calls, n, m, handed):
  attend = functools.partial(attention.attention, implementation="cudnn")
  _check(attend, _inputs(n, m))
  assert {*calls} == {handed}


def test_odd_chunks_of_a_mask(calls, monkeypatch):
  monkeypatch.setattr(api, "_default", lambda *_: "cudnn")
  mask = BlockCausal(5)
  attend = functools.partial(
    attention.attention, mask=mask, implementation="by_chunks"
  )
  _check(attend, _inputs(13, 13), mask)
  assert {*calls} == {(6, 6, True), (6, 10, True), (4, 14, True)}
  assert [stop - start for start, stop, _ in masks.segments(mask, 13, 13)] == [
    5,
    5,
    3,
  ]


def test_what_chunks_are_computed_by_refuses_in_its_own_words(monkeypatch):
  monkeypatch.setattr(api, "_default", lambda *_: "cudnn")
  x = jnp.zeros((1, 6, HEADS, E), jnp.float32)
  with pytest.raises(attention.Unsupported) as e:
    attention.attention(
      x, x, x, mask=BlockCausal(2), implementation="by_chunks"
    )
  assert str(e.value) == (
    "attention: cudnn computes bfloat16 and float16, found float32"
  )


@pytest.mark.parametrize("keys", ["tokens", None])
@pytest.mark.parametrize("axes", [{"context": 2}, {"fsdp": 2, "tensor": 2}])
def test_odd_numbers_of_tokens_over_a_mesh(calls, keys, axes):
  devices = jax.devices()[: 2 * len(axes)]
  attend = functools.partial(
    attention.sharded_attention, keys=keys, implementation="cudnn"
  )
  with jax.set_mesh(sharding.make_mesh(axes, devices)):
    _check(attend, _inputs(7, 7 if keys else 5, b=3))
  assert all(n % 2 == m % 2 == 0 for n, m, _ in calls)
  # With all keys on each device, queries are split along "context".
  half = {(4, 6, True)} if axes == {"context": 2} else {(8, 6, True)}
  assert {*calls} == ({(8, 8, True)} if keys else half)


def test_odd_numbers_of_tokens_in_scanned_blocks(calls):
  """As in training: blocks in a scan, rematerialised."""

  def attend(q, k, v, implementation):
    @jax.checkpoint
    def block(x, _):
      y = attention.attention(x, k, v, implementation=implementation)
      return (x + y).astype(x.dtype), None

    return jax.lax.scan(block, q, None, length=2)[0]

  cudnn, reference = (
    functools.partial(attend, implementation=name)
    for name in ("cudnn", "reference")
  )
  _check(cudnn, _inputs(7, 5), reference=reference)
  assert {*calls} == {(8, 6, True)}
