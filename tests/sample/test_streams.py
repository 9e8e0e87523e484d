"""Streams: KV caches against recomputing the prefix; prompts; continuation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, memory
from dcvideogen_jax.diffusion import flow, sampler, solvers
from dcvideogen_jax.latents import conditions, denoiser
from dcvideogen_jax.models import rope, wan_blocks
from dcvideogen_jax.sample import chunkwise
from tests import keys
from tests.sample.small import NEGATIVE, PHOTO, TEXT, make

# Latent frames and frames of a chunk, in the transformer and in DC-AE-V.
CHUNK, FRAMES = 2, 8
OTHER = np.random.default_rng(8).normal(size=(1, 6, 8)).astype(np.float32)
SIZE = {"height": 10, "width": 18}


@functools.cache
def made(task="t2v"):
  return make(task, chunk=CHUNK)


def stream(task="t2v", chunks=4, prompt=TEXT, **changes):
  options = {
    **SIZE,
    "frames": chunks * FRAMES,
    "negative_prompt": NEGATIVE,
    "steps": 2,
    "guidance_scale": 3.0,
    **({"image": PHOTO} if task == "i2v" and "given" not in changes else {}),
    **changes,
  }
  return made(task).generate_stream(prompt, **options)


def latents(*arguments, **changes):
  return [np.asarray(x) for x in stream(*arguments, **changes).latents()]


def views(n, window, sink):
  """Returns the chunks that chunk `n` attends to, itself last."""
  before = [
    i for i in range(n) if window is None or i < sink or i >= n - window
  ]
  return [*before, n]


@pytest.fixture
def without_caches(monkeypatch):
  """Replaces self-attention: whole sequences, one chunk of queries at a time.

  Keys are rotated by their position among those that the chunk attends to.
  Returns a function that takes the window and the sink, and that returns
  `recomputed` with this attention.
  """
  rotate = rope.rotate
  sharded_attention = wan_blocks.attention.sharded_attention

  def start(window, sink):
    def attend(q, k, v, *, keys, **options):
      if keys is None:
        return sharded_attention(q, k, v, keys=keys, **options)
      tokens = CHUNK * 3 * 5
      parts = [range(i, i + tokens) for i in range(0, q.shape[1], tokens)]
      found = []
      for n, own in enumerate(parts):
        seen = np.concatenate([parts[i] for i in views(n, window, sink)])
        places = (np.arange(len(seen) // 15), np.arange(3), np.arange(5))
        angles = rope.angles(places, q.shape[-1])
        mine = rotate(q[:, np.asarray(own)], angles[-tokens:])
        logits = jnp.einsum("bnke,bmke->bknm", mine, rotate(k[:, seen], angles))
        weights = jax.nn.softmax(logits / np.sqrt(q.shape[-1]), axis=-1)
        found.append(jnp.einsum("bknm,bmke->bnke", weights, v[:, seen]))
      return jnp.concatenate(found, axis=1)

    monkeypatch.setattr(wan_blocks.attention, "sharded_attention", attend)
    monkeypatch.setattr(rope, "rotate", lambda x, angles: x)
    return functools.partial(recomputed, attention=(window, sink))

  yield start
  monkeypatch.undo()


@functools.cache
def transformer(task, attention):
  """Returns the compiled transformer of a task, and its variables.

  Args:
    task: the task.
    attention: the window and the sink that `without_caches` patches in, or
      None; the programs of one are not those of another.
  """
  del attention
  module, variables = made(task).parts.transformer
  return jax.jit(lambda *inputs: module.apply(*inputs)), variables


solve = jax.jit(solvers.step)


def recomputed(
  task="t2v",
  chunks=4,
  known=(),
  level=0.0,
  scale=3.0,
  extra=None,
  attention=None,
):
  """Computes chunk by chunk without a cache: steps run the whole prefix."""
  apply, variables = transformer(task, attention)
  _, plan = made(task).plan(None, None, 2)
  clean = [*known]
  for n in range(chunks):
    prefix = [
      (1 - level) * x
      + level * np.asarray(denoiser.noise([0], x.shape[1:], chunkwise.CLEAN, j))
      for j, x in enumerate(clean)
    ]

    def velocity(x, time, text, prefix=prefix):
      x = np.concatenate([*prefix, x], axis=1)
      t = np.full((1, x.shape[1]), 1000 * level, np.float32)
      t[:, -CHUNK:] = time
      rest = ()
      if extra is not None:
        x = np.concatenate([x, extra["extra"][:, : x.shape[1]]], axis=-1)
        rest = (extra["image"],)
      return apply(variables, x, t, text, *rest)[:, -CHUNK:]

    x = denoiser.noise([0], (CHUNK, 3, 5, 4), n)
    state = solvers.init(plan.coefficients, x)
    for i in range(plan.steps):
      row = sampler.row(plan, i)
      with_text, without = (
        velocity(x, row.timesteps, text) for text in (TEXT, NEGATIVE)
      )
      v = without + scale * (with_text - without)
      x, state = solve(row.coefficients, state, x, v)
    clean.append(np.asarray(x))
  return clean


def assert_same(found, expected):
  assert len(found) == len(expected)
  for x, y in zip(found, expected, strict=True):
    assert np.abs(y).max() > 1
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ("window", "sink", "chunks", "batched"),
  [(None, 0, 4, True), (None, 0, 4, False), (1, 0, 4, True), (2, 1, 5, False)],
)
def test_caches_are_the_prefix(without_caches, window, sink, chunks, batched):
  found = latents(chunks=chunks, window=window, sink=sink, batched=batched)
  expected = recomputed if window is None else without_caches(window, sink)
  assert_same(found, expected(chunks=chunks))


def test_image_to_video(without_caches):
  found = latents("i2v", chunks=3, window=1)
  model = made("i2v")
  size = model.size(3 * FRAMES, *SIZE.values())
  extra = model.condition(PHOTO, None, size)
  expected = without_caches(1, 0)("i2v", chunks=3, extra=extra)
  assert_same(found, expected)


def test_clean_chunks_at_a_level(monkeypatch):
  watched = keys.Keys(monkeypatch)
  with jax.debug_key_reuse(True):
    found = latents(chunks=3, clean_level=0.1)
  assert len(watched.uses) > 5 and not watched.reused()
  monkeypatch.undo()
  assert_same(found, recomputed(chunks=3, level=0.1))
  assert np.abs(found[2] - latents(chunks=3)[2]).max() > 1e-3


def test_without_guidance():
  assert_same(
    latents(chunks=2, guidance_scale=1.0), recomputed(chunks=2, scale=1)
  )


def test_few_steps_are_their_levels_run_by_hand():
  """Without a cache: x0 = x - sigma v, then fresh noise up to the next level.

  The fresh noise is that of the seed and the chunk.
  """
  levels = (1.0, 0.8, 0.4)
  how = flow.Options("renoise", {}, 5.0, "wan", levels=levels)
  found = latents(chunks=2, guidance_scale=1.0, options=how, steps=3)
  apply, variables = transformer("t2v", None)
  made = []
  for n in range(2):
    x = np.asarray(denoiser.noise([0], (CHUNK, 3, 5, 4), n))
    key = jax.random.wrap_key_data(denoiser.keys([0], n))[0]
    for sigma, following in zip(levels, (*levels[1:], 0.0), strict=True):
      t = np.zeros((1, (n + 1) * CHUNK), np.float32)
      t[:, -CHUNK:] = 1000 * sigma
      clip = np.concatenate([*made, x], axis=1)
      v = apply(variables, clip, t, TEXT)[:, -CHUNK:]
      key, own = jax.random.split(key)
      fresh = jax.random.normal(own, x.shape[1:])[None]
      x = (1 - following) * (x - sigma * v) + following * fresh
    made.append(np.asarray(x))
  for ours, wanted in zip(found, made, strict=True):
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5)
  other = latents(chunks=2, guidance_scale=1.0, options=how, steps=3, seed=1)
  assert np.abs(other[1] - found[1]).max() > 0.1


def test_a_new_prompt_leaves_what_was_before():
  before = latents()
  changed = latents(prompt={0: TEXT, 2: OTHER})
  for n in range(4):
    same = np.array_equal(before[n], changed[n])
    assert same == (n < 2)


def test_length_changes_nothing():
  """Frames that do not fill a chunk are those of a longer video."""
  long = np.concatenate([*stream(chunks=2)], axis=1)
  short = np.concatenate([*stream(frames=13)], axis=1)
  assert long.shape == (1, 16, 10, 18, 3) and short.shape == (1, 13, 10, 18, 3)
  np.testing.assert_array_equal(short, long[:, :13])
  assert short.std() > 1


def test_decoded_as_it_comes_is_decoded_at_once():
  made_now = stream(chunks=3)
  chunks = []
  order = []
  for x in made_now.chunks():
    chunks.append(x)
    order.append(x.shape[1])
  assert order == [FRAMES] * 3
  model = made()
  whole = model.parts.space.decode(
    jnp.concatenate([*made_now.latents()], axis=1),
    made_now.size,
    jnp.float32,
    2**32,
  )
  np.testing.assert_array_equal(
    np.concatenate(chunks, axis=1), np.concatenate([*whole], axis=1)
  )


def test_a_chunk_is_shown_before_the_next_is_made():
  steps = []
  chunks = stream(chunks=3, on_step=lambda i, x: steps.append(i)).chunks()
  for n in range(3):
    next(chunks)
    assert steps == [*range(2 * (n + 1))]


def clip(frames):
  rng = np.random.default_rng(frames)
  return rng.integers(0, 256, (frames, 10, 18, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_going_on_from_a_video(task):
  video = clip(2 * FRAMES)
  going = stream(task, chunks=2, given=video)
  assert going.size == (4 * FRAMES, 10, 18)
  found = [np.asarray(x) for x in going.latents()]
  model = made(task)
  padded = np.stack([conditions.pad(x, (12, 20)) for x in video])[None]
  space = model.parts.space
  known = space.encode_whole(padded)
  np.testing.assert_allclose(
    np.concatenate(found[:2], axis=1), known, rtol=0, atol=1e-5
  )
  extra = None
  if task == "i2v":
    extra = model.condition(video[0], None, going.size)
  expected = recomputed(task, 2, [known[:, :2], known[:, 2:]], extra=extra)
  assert_same(found[2:], expected[2:])
  # Without a height and a width, the video's size is taken.
  small = stream(task, chunks=1, given=video, height=None, width=None)
  assert small.size == (3 * FRAMES, 10, 18)


def test_samples_of_a_batch():
  together = stream(prompt=np.concatenate([TEXT, OTHER]), seed=[3, 4], chunks=2)
  alone = stream(prompt=OTHER, seed=4, chunks=2)
  for x, y in zip(together.latents(), alone.latents(), strict=True):
    np.testing.assert_allclose(x[1:], y, rtol=0, atol=1e-5)
  frames = np.concatenate([*together.chunks(1)], axis=1)
  assert frames.shape == (1, 16, 10, 18, 3)
  with pytest.raises(errors.UserError, match="2 samples, found number 2"):
    next(together.chunks(2))


def test_a_window_bounds_memory_and_programs(compiled_programs):
  model = make(chunk=CHUNK)
  options = {"negative_prompt": NEGATIVE, "steps": 1, **SIZE}
  count, held = [], []
  running = model.generate_stream(
    TEXT, frames=9 * FRAMES, window=2, sink=1, **options
  )
  for _ in running.latents():
    count.append(len(compiled_programs))
    held.append(sum(x.nbytes for x in jax.live_arrays()))
  # Programs of steps and of cache updates, after 0 to 3 chunks.
  assert count[4:] == [8] * 5
  assert held[5:] == [held[5]] * 4


def test_what_is_kept():
  kept = chunkwise.KVCache(2, sink=1, window=2)
  for n in range(6):
    kept.add((n, -n))
  assert kept.by_pass() == ((0, 4, 5), (0, -4, -5))
  kept = chunkwise.KVCache(1, sink=0, window=None)
  assert kept.by_pass() == ((),)
  for n in range(3):
    kept.add((n,))
  assert kept.by_pass() == ((0, 1, 2),)


def test_saved_as_it_is_made(tmp_path):
  from dcvideogen_jax.data import video

  stream(chunks=2).save(tmp_path / "a.mp4")
  info = video.probe(tmp_path / "a.mp4")
  assert (info.frames, info.height, info.width, info.fps) == (16, 10, 18, 16)


def test_memory_that_keys_and_values_leave(monkeypatch):
  """A chunk takes 2 layers x 24 channels x 30 tokens x 2 x 2 x 4 bytes.

  The factors are branches of guidance, keys and values, and float32.
  """
  chunk = 2 * 24 * 30 * 2 * 2 * 4
  monkeypatch.setattr(memory, "free_on_all", lambda: 3.5 * chunk / 0.85)
  for window in (None, 3):
    with pytest.raises(errors.UserError, match="of 4 chunks take .* smaller"):
      next(stream(chunks=5, window=window).chunks())
  # The memory left for the autoencoder is too small.
  with pytest.raises(errors.UserError, match="does not fit"):
    next(stream(chunks=5, window=2).chunks())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"window": 0}, "the window has 1 chunk or more, found 0"),
    ({"sink": 1}, "a sink belongs to a window"),
    ({"window": 1, "sink": -1}, "0 chunks or more, found -1"),
    ({"clean_level": 1.0}, "from 0 up to 1, found 1.0"),
    ({"chunk": 0}, "1 latent frame or more, found 0"),
    ({"window": True}, "the window has 1 chunk or more, found True"),
    ({"window": 1, "sink": True}, "0 chunks or more, found True"),
    ({"clean_level": False}, "from 0 up to 1, found False"),
    ({"chunk": True}, "1 latent frame or more, found True"),
    ({"prompt": {False: TEXT}}, "with 0, found .False"),
    ({"chunk": 3}, "multiples of 2 latent frames, found 3"),
    ({"frames": 0}, "frames must be at least 1"),
    ({"prompt": {1: TEXT}}, "with 0, found"),
    ({"prompt": {0: TEXT, 4: TEXT}}, "there is no chunk 4 .* 4 are made"),
    ({"given": clip(13)}, "chunks of 8 frames, found 13 .*the first 5"),
    ({"given": clip(3)}, "found 3 frames$"),
    ({"given": clip(8) / 255}, "uint8"),
    ({"given": clip(8), "height": 12}, "is 10x18, expected 12x18"),
    ({"image": PHOTO}, "takes no image"),
    ({"image": PHOTO, "given": clip(8)}, "not both"),
    ({"memory_budget": 1}, "does not fit"),
  ],
)
def test_streams_that_make_no_sense(changes, message):
  with pytest.raises(errors.UserError, match=message):
    next(stream(**{"prompt": TEXT, **changes}).chunks())


def test_a_transformer_of_whole_clips():
  model = make()
  options = {"negative_prompt": NEGATIVE, "frames": 16, "steps": 1, **SIZE}
  with pytest.raises(errors.UserError, match="trained on whole clips"):
    model.generate_stream(TEXT, **options)
  found = model.generate_stream(TEXT, chunk=2, **options)
  assert [x.shape[1] for x in found.latents()] == [2, 2]
