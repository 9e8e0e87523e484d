"""Every implementation with a mask against plain numpy in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import flops, sharding
from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import (
  BlockCausal,
  TeacherForcing,
  api,
  chunked,
  flash,
  masks,
  splash,
)
from dcvideogen_jax.plan import hardware

BLOCKS = splash.Blocks(256, 256, 128, 256, 128)
TILES = flash.Tiles(
  flash.Tile(32, 16, 4, 2), flash.Tile(16, 32, 4, 2), flash.Tile(32, 16, 4, 2)
)
NAMES = ["chunked", "by_chunks", "splash", "pallas"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
  """Makes bands, steps, blocks and tiles so small that few tokens need many."""
  monkeypatch.setattr(chunked, "WEIGHTS", 2**11)
  monkeypatch.setattr(chunked, "BANDS", 4)
  for name, kernel in (
    ("splash", functools.partial(splash.splash, blocks=BLOCKS)),
    ("pallas", functools.partial(flash.flash, tiles=TILES)),
  ):
    kernel = functools.partial(kernel, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, name, kernel)


def _inputs(n, m, heads=2, e=16, dtype=np.float32, b=1):
  random = np.random.default_rng(n * m)
  return [
    jnp.asarray(random.normal(size=(b, size, heads, e)) * 2, dtype)
    for size in (n, m, m)
  ]


def _weights(shape):
  return np.random.default_rng(0).normal(size=shape)


def _found(name, mask, *inputs):
  """Returns the output and gradients of its weighted sum, in float32."""
  weights = jnp.asarray(_weights(inputs[0].shape), jnp.float32)

  def loss(*inputs):
    out = attention.attention(*inputs, mask=mask, implementation=name)
    return (out.astype(jnp.float32) * weights).sum(), out

  function = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  gradients, out = jax.jit(function)(*inputs)
  assert out.dtype == inputs[2].dtype
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


def _expected(mask, *inputs):
  """Computes the same in plain numpy, in float64."""
  q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in inputs)
  n, m, e = q.shape[2], k.shape[2], q.shape[3]
  seen = np.ones((n, m)) if mask is None else masks.visible(mask, n, m)
  logits = np.where(seen, q @ k.swapaxes(2, 3) / e**0.5, -np.inf)
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  dy = _weights(inputs[0].shape).swapaxes(1, 2)
  dp = dy @ v.swapaxes(2, 3)
  dlogits = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / e**0.5
  found = (
    p @ v,
    dlogits @ k,
    dlogits.swapaxes(2, 3) @ q,
    p.swapaxes(2, 3) @ dy,
  )
  return [x.swapaxes(1, 2) for x in found]


def _check(name, mask, *inputs, tolerance=2e-5):
  found, expected = _found(name, mask, *inputs), _expected(mask, *inputs)
  for mine, right in zip(found, expected, strict=True):
    scale = tolerance * max(1, abs(right).max())
    np.testing.assert_allclose(mine, right, atol=scale, rtol=0)


CASES = [
  (64, 64, BlockCausal(32)),  # No partial tile.
  (61, 61, BlockCausal(20)),
  (45, 90, BlockCausal(18, 36)),  # After a cached prefix.
  (33, 150, BlockCausal(40, 50)),  # Starts within a block.
  (9, 9, BlockCausal(1)),
  (40, 30, BlockCausal(100)),
  (90, 90, TeacherForcing(16, 45)),
]


@pytest.mark.parametrize("name", ["reference", *NAMES])
@pytest.mark.parametrize(("n", "m", "mask"), CASES)
def test_forward_and_gradients(name, n, m, mask):
  _check(name, mask, *_inputs(n, m))


# Blocks of 128 at least, so that some of splash's are skipped and some partial.
@pytest.mark.parametrize(
  ("n", "m", "mask"),
  [
    (300, 700, BlockCausal(200, 130)),
    (520, 520, BlockCausal(256)),
    (600, 600, TeacherForcing(130, 300)),
  ],
)
def test_splash_over_many_blocks(n, m, mask):
  _check("splash", mask, *_inputs(n, m, heads=1))


@pytest.mark.parametrize("name", NAMES)
def test_masks_with_the_same_numbers(name):
  """Caches by mask do not confuse two kinds with equal fields."""
  for mask in (TeacherForcing(4, 0), BlockCausal(4, 0), TeacherForcing(4, 0)):
    _check(name, mask, *_inputs(16, 16))


@pytest.mark.parametrize("blocks", [*splash.BLOCKS.values(), BLOCKS])
def test_splash_knows_every_block_of_its_grid(blocks, monkeypatch):
  """The mask covers padding blocks too, which interpretation never reads."""
  made = []

  class Recorded(splash.kernel.SplashAttentionKernel):
    def __init__(self, *infos, block_sizes, **options):
      made.append((infos, block_sizes))
      super().__init__(*infos, block_sizes=block_sizes, **options)

  monkeypatch.setattr(splash.kernel, "SplashAttentionKernel", Recorded)
  for n, m in ((1030, 1030), (5000, 5000), (10800, 10800), (300, 5130)):
    x = [jax.ShapeDtypeStruct((1, t, 1, 128), jnp.bfloat16) for t in (n, m, m)]
    function = functools.partial(
      splash.splash, mask=BlockCausal(256, m - n), blocks=blocks, interpret=True
    )
    jax.eval_shape(function, *x)
    (forward, dq, dkv), sizes = made.pop()
    rows, keys = (
      -(-t // size) * size
      for t, size in ((n, sizes.block_q), (m, sizes.block_kv))
    )
    for info, block_q, block_k in (
      (forward, sizes.block_q, sizes.block_kv),
      (dq, sizes.block_q_dq, sizes.block_kv_dq),
      (dkv, sizes.block_q_dkv, sizes.block_kv_dkv),
    ):
      shape = (1, rows // block_q, keys // block_k)
      assert info.block_mask.shape == info.data_next.shape == shape


@pytest.mark.parametrize("e", [64, 128])
@pytest.mark.parametrize(
  ("dtype", "tolerance"),
  [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)],
)
def test_pallas_in_its_dtypes_and_widths(e, dtype, tolerance):
  inputs = _inputs(50, 70, heads=1, e=e, dtype=dtype, b=2)
  _check("pallas", BlockCausal(24, 16), *inputs, tolerance=tolerance)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (32, 64), (70, 45), (16, 130)])
def test_pallas_without_a_mask(n, m):
  _check("pallas", None, *_inputs(n, m))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_fuzzed(name, seed):
  random = np.random.default_rng(100 + seed)
  n, m, block, offset = (int(x) for x in random.integers(10, 120, 4))
  mask, e = BlockCausal(block, offset), int(random.choice([16, 32]))
  if seed % 3 == 2:
    mask, m = TeacherForcing(block, int(random.integers(n + 1))), n
  _check(name, mask, *_inputs(n, m, int(random.integers(1, 4)), e))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_is_not_touched(name):
  """Masked values are not even multiplied by zero, which would keep NaN."""
  size = 256  # Of a block, in whole tiles of all implementations.
  q, k, v = _inputs(2 * size, 2 * size, heads=1)
  k, v = (x.at[:, size:].set(jnp.nan) for x in (k, v))
  out, dq, _, _ = _found(name, BlockCausal(size), q, k, v)
  expected = _expected(BlockCausal(size), *_inputs(2 * size, 2 * size, heads=1))
  right, of_q = (x[:, :size] for x in expected[:2])
  np.testing.assert_allclose(out[:, :size], right, atol=2e-5)
  np.testing.assert_allclose(dq[:, :size], of_q, atol=2e-5)
  assert np.isnan(out[:, size:]).all()

  # Queries of the first block do not enter gradients of the second's keys.
  q, k, v = _inputs(2 * size, 2 * size, heads=1)
  _, _, dk, dv = _found(
    name, BlockCausal(size), q.at[:, :size].set(np.nan), k, v
  )
  assert np.isfinite(dk[:, size:]).all() and np.isfinite(dv[:, size:]).all()
  assert np.isnan(dk[:, :size]).any()


def _work(name, mask, tokens, gradient=False):
  x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)

  def function(q, k, v):
    return attention.attention(q, k, v, mask=mask, implementation=name)

  if gradient:
    forward = function
    function = jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2))
  return flops.count(jax.jit(function).trace(x, x, x).jaxpr.jaxpr)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chunks", [2, 4])
def test_the_work_is_that_of_what_is_visible(name, gradient, chunks):
  tokens = 1024
  masked = _work(name, BlockCausal(tokens // chunks), tokens, gradient)
  dense = _work(name, None, tokens, gradient)
  # Splash's gradients take the product of the output and its gradient outside
  # the kernel, for every token.
  outside = 2 * tokens * 16 if name == "splash" and gradient else 0
  visible = (dense - outside) * (chunks + 1) // (2 * chunks)
  assert masked == visible + outside
  if not gradient:
    assert dense == 2 * 2 * tokens**2 * 16


def test_many_small_blocks_take_few_bands():
  """The program does not grow, and little of the work is masked out."""
  dense = _work("chunked", None, 1024)
  assert 0.5 < _work("chunked", BlockCausal(1), 1024) / dense < 0.65
  with pytest.raises(NotImplementedError, match="256 chunks, found 1024"):
    _work("by_chunks", BlockCausal(1), 1024)


def test_chunks_go_back_one_after_the_other():
  """Otherwise XLA for GPUs keeps the key gradients of all chunks at once."""
  q, k, v = _inputs(12, 12)
  attend = functools.partial(
    attention.attention, mask=BlockCausal(4), implementation="by_chunks"
  )
  forward, back = (
    str(jax.make_jaxpr(function)(q, k, v)).count("optimization_barrier")
    for function in (attend, jax.grad(lambda *x: attend(*x).sum()))
  )
  assert (forward, back) == (0, 3)


@pytest.mark.parametrize("axes", [{"context": 4}, {"data": 2, "context": 4}])
@pytest.mark.parametrize(
  ("n", "m", "mask"),
  [
    (13, 13, BlockCausal(4)),
    (6, 15, BlockCausal(3, 9)),
    (14, 14, TeacherForcing(3, 7)),
    (5, 14, None),
  ],
)
def test_a_mesh_changes_nothing(axes, n, m, mask):
  inputs = _inputs(n, m, heads=4, b=3)

  def found(*inputs):
    def loss(*inputs):
      out = attention.sharded_attention(
        *inputs, keys="tokens", mask=mask, implementation="reference"
      )
      return (out**2).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)

  alone = jax.jit(found)(*inputs)
  devices = jax.devices()[: math.prod(axes.values())]
  with jax.set_mesh(sharding.make_mesh(axes, devices)):
    split = jax.jit(found)(*inputs)
  for a, b in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5)


def test_a_mask_of_all_queries_is_none_of_some():
  q, k, v = _inputs(8, 8, heads=4)
  with (
    jax.set_mesh(sharding.make_mesh({"context": 4}, jax.devices()[:4])),
    pytest.raises(NotImplementedError, match="mask"),
  ):
    attention.sharded_attention(q, k, v, keys=None, mask=BlockCausal(2))


def test_named_implementations_do_not_fall_back(monkeypatch, wrong_shapes):
  monkeypatch.undo()
  x = jnp.zeros((1, 4, 2, 16), jnp.bfloat16)
  named = functools.partial(attention.attention, mask=BlockCausal(2))
  with pytest.raises(NotImplementedError, match="cudnn .* without a mask"):
    named(x, x, x, implementation="cudnn")
  for q, message in (
    (x.astype(jnp.float32), "bfloat16, float32"),
    (jnp.zeros((1, 4, 2, 24), jnp.bfloat16), "found 24"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      named(q, x, x, implementation="pallas")
  kind = jax.sharding.AbstractDevice("TPU v5", None, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=kind)
  with (
    jax.sharding.use_abstract_mesh(mesh),
    pytest.raises(NotImplementedError, match="GPUs"),
  ):
    named(x, x, x, implementation="pallas")


def test_pallas_is_interpreted_on_a_cpu(monkeypatch):
  monkeypatch.undo()
  inputs = _inputs(33, 33)
  found, expected = (
    attention.attention(*inputs, mask=BlockCausal(10), implementation=name)
    for name in ("pallas", "reference")
  )
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
  ("platform", "n", "block", "dtype", "expected"),
  [
    ("cuda", 8192, 4096, jnp.bfloat16, "by_chunks"),
    ("cuda", 8192, 32, jnp.bfloat16, "by_chunks"),
    ("cuda", 8192, 31, jnp.bfloat16, "chunked"),
    ("cuda", 8192, 4096, jnp.float32, "chunked"),
    ("tpu", 8192, 4096, jnp.bfloat16, "splash"),
    ("tpu", 8, 4, jnp.bfloat16, "reference"),
    ("cpu", 8192, 4096, jnp.bfloat16, "chunked"),
    ("cpu", 8, 4, jnp.float32, "reference"),
  ],
)
def test_choice_for_a_mask(monkeypatch, platform, n, block, dtype, expected):
  taken = []
  for name in api.IMPLEMENTATIONS:

    def note(q, *_, name=name):
      taken.append(name)
      return q

    monkeypatch.setitem(api.IMPLEMENTATIONS, name, note)
  kind = jax.sharding.AbstractDevice("some kind", None, platform)
  mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=kind)
  x = jax.ShapeDtypeStruct((1, n, 2, 64), dtype)
  attend = functools.partial(attention.attention, mask=BlockCausal(block))
  with jax.sharding.use_abstract_mesh(mesh):
    jax.eval_shape(lambda x: attend(x, x, x), x)
  assert taken == [expected]


def test_tiles_are_those_of_the_device():
  hopper = [flash.TILES["NVIDIA H", e] for e in (64, 128)]
  for kind in (hardware.GPUS["h100"].kind, hardware.GPUS["h200"].kind):
    assert [flash.tiles(kind, e, jnp.bfloat16) for e in (32, 128)] == hopper
  small = flash.tiles(hardware.GPUS["a100"].kind, 64, jnp.bfloat16)
  assert small == flash.tiles("NVIDIA H200", 64, jnp.float32)
  assert small not in hopper
