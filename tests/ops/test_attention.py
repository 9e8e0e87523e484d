"""Every implementation of attention against plain numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import chunked

ANYWHERE = [name for name in attention.IMPLEMENTATIONS if name != "cudnn"]


def _inputs(n, m, heads=2, e=16, dtype=np.float32):
  random = np.random.default_rng(n * m)
  return [
    jnp.asarray(random.normal(size=(2, size, heads, e)) * 2, dtype)
    for size in (n, m, m)
  ]


def _expected(q, k, v):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  logits = np.einsum("bnke,bmke->bknm", q, k) / q.shape[-1] ** 0.5
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  return np.einsum("bknm,bmke->bnke", weights, v)


@pytest.fixture
def small_steps(monkeypatch):
  monkeypatch.setattr(chunked, "WEIGHTS", 64)


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 13), (33, 5), (8, 512)])
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(np.float32, 2e-6), (jnp.bfloat16, 3e-2)]
)
def test_forward(small_steps, name, sizes, dtype, tolerance):
  inputs = _inputs(*sizes, dtype=dtype)
  out = jax.jit(attention.IMPLEMENTATIONS[name])(*inputs)
  assert out.dtype == dtype
  expected = _expected(*inputs)
  np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ANYWHERE[1:])
@pytest.mark.parametrize("sizes", [(7, 13), (33, 5)])
def test_gradients(small_steps, name, sizes):
  inputs = _inputs(*sizes)
  weights = np.random.default_rng(0).normal(size=inputs[0].shape)

  def gradients(name):
    def loss(q, k, v):
      out = attention.attention(q, k, v, implementation=name)
      return (out * jnp.asarray(weights, jnp.float32)).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

  for mine, reference in zip(
    gradients(name), gradients("reference"), strict=True
  ):
    np.testing.assert_allclose(mine, reference, atol=2e-5)


def _temporaries(function):
  # From 2048 tokens on XLA fuses the reference by itself, on a CPU.
  x = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.float32)
  compiled = jax.jit(function).lower(x, x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes / (1024**2 * 4)


def test_chunks_hold_few_weights(monkeypatch):
  monkeypatch.setattr(chunked, "WEIGHTS", 2**16)
  functions = attention.IMPLEMENTATIONS
  assert _temporaries(functions["reference"]) > 2
  assert _temporaries(functions["chunked"]) < 0.8
  gradient = jax.grad(lambda *qkv: chunked.chunked(*qkv).sum())
  assert _temporaries(gradient) < 1.5


def test_unset_takes_small_and_large_exactly():
  for n in (8, 2100):
    q, k, v = _inputs(n, n, heads=1, e=8)
    out = jax.jit(attention.attention)(q, k, v)
    np.testing.assert_allclose(out, _expected(q, k, v), atol=2e-5)


def test_named_implementation_does_not_fall_back():
  q, k, v = _inputs(4, 4)
  with pytest.raises(NotImplementedError, match="float32"):
    attention.attention(q, k, v, implementation="cudnn")
  with pytest.raises(ValueError, match="flash"):
    attention.attention(q, k, v, implementation="flash")


class Gpu:
  """Stands for a device of some capability."""

  def __init__(self, capability):
    if capability is not None:
      self.compute_capability = capability


@pytest.mark.parametrize(
  ("capability", "dtype", "e", "expected"),
  [
    ("9.0", jnp.bfloat16, 128, "cudnn"),
    ("8.0", jnp.float16, 32, "cudnn"),
    ("7.5", jnp.bfloat16, 128, "reference"),
    (None, jnp.bfloat16, 128, "reference"),
    ("9.0", jnp.float32, 128, "reference"),
    ("9.0", jnp.bfloat16, 384, "reference"),
    ("9.0", jnp.bfloat16, 20, "reference"),
  ],
)
def test_choice_on_a_gpu(monkeypatch, capability, dtype, e, expected):
  taken = []
  for name in attention.IMPLEMENTATIONS:
    monkeypatch.setitem(
      attention.IMPLEMENTATIONS, name, lambda *_, name=name: taken.append(name)
    )
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])
  x = jnp.zeros((1, 4, 1, e), dtype)
  attention.attention(x, x, x)
  assert taken == [expected]
