"""The transformer in chunks: visible chunks, KV caches, clean copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.models import wan_dit
from tests import random_weights
from tests.adapt import tiny_models

# Five frames in chunks of two, the last one shorter; three rows, two columns.
FRAMES, GRID, CHUNK = 5, (3, 2), 2
ALL = (slice(0, 2), slice(2, 4), slice(4, 5))


@functools.cache
def model(kind="t2v", **changes):
  changes = {"chunk": CHUNK, **changes}
  module = tiny_models.module(f"deep_{kind}", **changes)
  return module, tiny_models.variables(module)


def inputs(kind="t2v", b=2, seed=0):
  rng = np.random.default_rng(seed)

  def random(*shape):
    return rng.normal(size=(b, *shape)).astype(np.float32)

  channels = 16 if kind == "i2v" else 6
  image = (random(3, 10),) if kind == "i2v" else ()
  return random(FRAMES, *GRID, channels), (random(5, 12), *image)


def apply(kind, x, t, rest, changes=None, **given):
  module, variables = model(kind, **(changes or {}))
  return random_weights.jitted(module)(variables, x, t, *rest, **given)


def times(*levels, b=2):
  """Repeats the timestep of each chunk for its frames."""
  frames = np.repeat(np.float32(levels), [s.stop - s.start for s in ALL])
  return np.tile(frames, (b, 1))


def assert_same(found, expected, atol=1e-5):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_chunk_sees_itself_and_the_past(kind):
  x, rest = inputs(kind)
  t = times(700, 500, 300)
  whole = np.asarray(apply(kind, x, t, rest))
  for i, changed in enumerate(ALL):
    other = x.copy()
    other[:, changed.stop - 1] += 1
    found = np.asarray(apply(kind, other, t, rest))
    for j, chunk in enumerate(ALL):
      distance = np.abs(found[:, chunk] - whole[:, chunk]).max(axis=(0, 2, 3))
      if j < i:
        assert not distance.any()
      else:
        assert (distance > 1e-4).all()


def test_one_chunk_is_full_attention():
  x, rest = inputs()
  t = np.float32([300, 800])
  full = apply("t2v", x, t, rest, {"chunk": None})
  for chunk in (FRAMES, FRAMES + 3):
    np.testing.assert_array_equal(
      full, apply("t2v", x, t, rest, {"chunk": chunk})
    )
  assert np.abs(full - apply("t2v", x, t, rest)).max() > 1e-3


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_past_is_what_was_kept(kind):
  """Chunk by chunk with the KV cache equals all chunks at once."""
  x, rest = inputs(kind)
  module, variables = model(kind)
  t = times(0, 500, 300)
  whole = apply(kind, x, t, rest)
  step = random_weights.jitted(module, mutable="cache")
  past = ()
  for chunk in ALL:
    found, state = step(variables, x[:, chunk], t[:, chunk], *rest, past=past)
    assert_same(found, whole[:, chunk])
    past = (*past, wan_dit.kv_cache(state))
  assert past[0].keys.shape == (2, 2, 2 * 6, 2, 8)
  assert past[2].values.shape == (2, 2, 1 * 6, 2, 8)


def test_several_chunks_after_a_past():
  """Two chunks at once after the first chunk's KV cache."""
  x, rest = inputs()
  module, variables = model()
  t = times(0, 500, 300)
  step = random_weights.jitted(module, mutable="cache")
  _, state = step(variables, x[:, :2], t[:, :2], *rest)
  past = (wan_dit.kv_cache(state),)
  found = apply("t2v", x[:, 2:], t[:, 2:], rest, past=past)
  assert_same(found, apply("t2v", x, t, rest)[:, 2:])


def test_initialisation_leaves_no_cache():
  module, variables = model()
  assert set(variables) == {"params"}


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("level", [0.0, 40.0])
def test_clean_copies_are_the_past(kind, level):
  """Each noisy chunk equals a run after the clean chunks before it."""
  x, rest = inputs(kind)
  clean, _ = inputs(kind, seed=1)
  noisy = times(700, 500, 300)
  found = apply(
    kind,
    x,
    noisy,
    rest,
    clean=wan_dit.Clean(clean, np.full(2, level, np.float32)),
  )
  assert found.shape == (2, FRAMES, *GRID, 6)
  for chunk in ALL:
    before = slice(0, chunk.start)
    sequence = np.concatenate([clean[:, before], x[:, chunk]], axis=1)
    t = np.concatenate(
      [np.full((2, chunk.start), level, np.float32), noisy[:, chunk]], axis=1
    )
    alone = apply(kind, sequence, t, rest)[:, chunk.start :]
    assert_same(found[:, chunk], alone)


def test_gradients_reach_both_copies():
  x, rest = inputs()
  clean, _ = inputs(seed=1)
  module, variables = model(remat=True)

  def loss(variables, x, clean):
    copies = wan_dit.Clean(clean, jnp.zeros(2))
    v = module.apply(variables, x, times(700, 500, 300), *rest, clean=copies)
    return jnp.square(v).mean()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(variables, x, clean)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[:2]))
  # Only the last chunk itself sees its clean copy.
  by_frame = np.abs(grads[2]).max(axis=(0, 2, 3, 4))
  assert (by_frame[:4] > 0).all() and not by_frame[4:].any()


def test_what_does_not_fit():
  x, rest = inputs()
  copies = wan_dit.Clean(x, np.zeros(2, np.float32))
  with pytest.raises(ValueError, match="need a model with a chunk"):
    apply("t2v", x, times(1, 2, 3), rest, {"chunk": None}, clean=copies)
  with pytest.raises(ValueError, match="expected clean copies"):
    short = wan_dit.Clean(x[:, :4], np.zeros(2, np.float32))
    apply("t2v", x, times(1, 2, 3), rest, clean=short)
  with pytest.raises(ValueError, match="chunk is 0, expected a positive whole"):
    tiny_models.module("deep_t2v", chunk=0)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_chunk_is_written_and_read(layout, tmp_path):
  from dcvideogen_jax.convert import wan_dit as table

  fields = convert.config_of(tiny_models.module("deep_t2v", chunk=3))
  json = table.CONFIGS[layout](fields)
  assert table.config_from(json)["chunk"] == 3
  plain = table.CONFIGS[layout](
    convert.config_of(tiny_models.module("deep_t2v"))
  )
  assert "chunk" not in plain and table.config_from(plain)["chunk"] is None
  with pytest.raises(ValueError, match="chunk is 0"):
    wan_dit.build(table.config_from(json | {"chunk": 0}))
