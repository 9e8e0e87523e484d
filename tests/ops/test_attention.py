"""Every implementation of attention against plain numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import api, chunked, splash

ANYWHERE = ["reference", "chunked"]
# Blocks of splash: two sizes for queries and three for keys.
BLOCKS = splash.Blocks(256, 512, 128, 256, 128)


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


def _splash(q, k, v):
  return splash.splash(q, k, v, blocks=BLOCKS, interpret=True)


# The keys fill one block, part of one block, or two blocks.
@pytest.mark.parametrize(("n", "m"), [(130, 128), (7, 13), (300, 700)])
def test_splash(n, m):
  """Checks forward and gradients; a visible padding key would dominate."""
  q, k, v = _inputs(n, m)
  q, k = abs(q), -abs(k)
  weights = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)

  def found(function):
    def loss(*inputs):
      out = function(*inputs)
      return (out * weights).sum(), out

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    gradients, out = jax.jit(grad)(q, k, v)
    return out, *gradients

  expected = found(attention.IMPLEMENTATIONS["reference"])
  for mine, reference in zip(found(_splash), expected, strict=True):
    np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=3e-5)


def test_splash_in_bfloat16():
  inputs = _inputs(33, 5, dtype=jnp.bfloat16)
  out = jax.jit(_splash)(*inputs)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out, _expected(*inputs), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("tokens", [1, 128, 257, 512, 600, 7800, 163200])
@pytest.mark.parametrize("most", [(2048, 1024, 512), (1024, 512), (512,)])
def test_blocks_of_splash_fit(tokens, most):
  total, sizes = splash._fit(tokens, *most)
  assert total >= tokens
  assert all(size % splash.LANES == 0 for size in sizes)
  assert all(size <= limit for size, limit in zip(sizes, most, strict=True))
  wholes = (total, *sizes)
  for whole, part in zip(wholes, sizes, strict=False):
    assert whole % part == 0
  # No block is empty, and blocks of many tokens exceed half of the largest.
  assert total - tokens < sizes[0]
  assert tokens < most[0] or sizes[0] > most[0] // 2


def _temporaries(function):
  # From 2048 tokens on, XLA for CPUs fuses the reference by itself.
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


class Device:
  """A fake GPU of some compute capability."""

  platform = device_kind = "gpu"

  def __init__(self, capability):
    if capability is not None:
      self.compute_capability = capability


@pytest.fixture
def taken(monkeypatch):
  """Returns the names of implementations that are called; none of them runs."""
  names = []
  for name in attention.IMPLEMENTATIONS:

    def note(q, *_, name=name):
      names.append(name)
      return q

    monkeypatch.setitem(attention.IMPLEMENTATIONS, name, note)
  return names


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
def test_choice_on_a_gpu(monkeypatch, taken, capability, dtype, e, expected):
  monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
  x = jnp.zeros((1, 4, 1, e), dtype)
  attention.attention(x, x, x)
  assert taken == [expected]


@pytest.mark.parametrize(
  ("platform", "n", "dtype", "expected"),
  [
    ("tpu", 4096, jnp.bfloat16, "splash"),
    ("tpu", 4, jnp.bfloat16, "reference"),
    ("tpu", 4096, jnp.float32, "chunked"),
    ("cuda", 4096, jnp.bfloat16, "cudnn"),
    ("cpu", 4096, jnp.bfloat16, "chunked"),
  ],
)
def test_choice_for_a_mesh_that_is_not_there(
  taken, platform, n, dtype, expected
):
  """The devices of the mesh count, not those of this machine."""
  kind = jax.sharding.AbstractDevice("some kind", None, platform)
  mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=kind)
  x = jax.ShapeDtypeStruct((1, n, 2, 8), dtype)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.eval_shape(lambda x: attention.attention(x, x, x), x)
  assert taken == [expected]


@pytest.mark.parametrize(
  ("platform", "dtype", "e", "mask", "reason"),
  [
    ("cuda", jnp.float32, 16, None, "cuDNN computes bfloat16 and float16"),
    ("cuda", jnp.bfloat16, 136, None, "heads of up to 128"),
    ("cuda", jnp.bfloat16, 20, None, "multiples of 8"),
    ("cuda", jnp.bfloat16, 16, attention.BlockCausal(8), "at most 256 chunks"),
    ("tpu", jnp.float32, 16, None, "splash computes bfloat16"),
    ("cuda", jnp.bfloat16, 16, None, None),
    ("tpu", jnp.bfloat16, 16, None, None),
    ("cpu", jnp.float32, 16, None, None),
  ],
)
def test_the_slow_path_of_an_accelerator_is_said_once(
  taken, monkeypatch, recwarn, platform, dtype, e, mask, reason
):
  monkeypatch.setattr(api, "_said", set())
  kind = jax.sharding.AbstractDevice("some kind", None, platform)
  mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=kind)
  for tokens in (8192, 4096):
    x = jax.ShapeDtypeStruct((1, tokens, 2, e), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
      jax.eval_shape(lambda x: attention.attention(x, x, x, mask=mask), x)
  assert (taken == ["chunked"] * 2) == (reason is not None or platform == "cpu")
  said = [str(warning.message) for warning in recwarn]
  if reason is None:
    assert said == []
  else:
    (line,) = said
    start = (
      f"{'masked ' if mask else ''}attention of 8192 queries and 8192 keys"
    )
    assert line.startswith(f"{start} in {jnp.dtype(dtype)}, heads of {e}, ")
    assert reason in line


def test_the_slow_path_by_name_needs_no_word(monkeypatch, recwarn):
  monkeypatch.setattr(jax, "devices", lambda: [Device("9.0")])
  q = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
  attend = functools.partial(attention.attention, implementation="chunked")
  jax.eval_shape(attend, q, q, q)
  assert not recwarn.list
