"""The flow-matching task of block-causal models: levels by chunk, copies."""

import jax
import numpy as np
import pytest

from dcvideogen_jax import errors, tree
from dcvideogen_jax.train import denoise
from tests.adapt import runs, tiny_models

# Latent frames of a clip, and of its chunks; the last one is shorter.
FRAMES, CHUNK = 5, 2
CHUNKS = (slice(0, 2), slice(2, 4), slice(4, 5))


def config(kind="t2v", chunk=CHUNK, phase="full", **forcing):
  model = tiny_models.FIELDS[f"deep_{kind}"] | {"chunk": chunk}
  forcing = {"per_chunk": True, "clean": None} | forcing
  return runs.config(phase, kind, model=model, forcing=forcing)


def drawn_by(task, kind="t2v", seed=3):
  batch = runs.batch(kind=kind, frames=FRAMES)
  return dict(task.draw(batch, jax.random.key(seed)))


def losses(settings, drawn, kind="t2v"):
  variables = tiny_models.variables(tiny_models.module(f"deep_{kind}"))
  return jax.jit(denoise.denoise(settings).loss_fn)(variables, drawn)


def predicted(kind, chunk, x, timestep, drawn):
  """What the model makes of any input, texts that are dropped zero."""
  module = tiny_models.module(f"deep_{kind}", chunk=chunk)
  variables = tiny_models.variables(module)
  text = np.where(np.asarray(drawn["drop"])[:, None, None], 0, drawn["text"])
  image = (drawn["image"],) if kind == "i2v" else ()
  return jax.jit(module.apply)(variables, x, timestep, text, *image)


def by_frame(levels):
  return np.repeat(np.asarray(levels), CHUNK, axis=1)[:, :FRAMES]


def noisy(drawn, sigma, name="noise"):
  sigma = sigma[:, :, None, None, None]
  return (1 - sigma) * drawn["deep"] + sigma * np.asarray(drawn[name])


def conditioned(kind, x, drawn):
  if kind == "t2v":
    return x
  mask = np.zeros((*x.shape[:-1], 4), np.float32)
  mask[:, 0] = 1
  return np.concatenate([x, mask, drawn["deep_condition"]], axis=-1)


def error_of(v, drawn, frames=slice(None)):
  target = np.asarray(drawn["noise"] - drawn["deep"])[:, frames]
  return np.square(v - target).mean((2, 3, 4))


def test_every_chunk_has_a_level():
  task = denoise.denoise(config())
  batch = runs.batch(600, frames=FRAMES)
  drawn = jax.jit(task.draw)(batch, jax.random.key(1))
  assert {drawn[k].shape for k in ("sigma", "timestep", "weight")} == {(600, 3)}
  sigma = np.asarray(drawn["sigma"])
  assert abs(sigma.mean() - 0.5) < 0.03 and np.ptp(sigma, axis=1).min() > 0
  assert np.abs(np.corrcoef(sigma.T) - np.eye(3)).max() < 0.15
  np.testing.assert_allclose(drawn["timestep"], 1000 * sigma, rtol=1e-6)


def test_equal_levels_and_a_full_mask_are_the_ordinary_loss():
  ordinary = config(chunk=None, per_chunk=False)
  drawn = drawn_by(denoise.denoise(ordinary))
  loss, metrics = losses(ordinary, drawn)
  levels = {k: drawn[k][:, None] for k in ("sigma", "timestep", "weight")}
  for chunk in (FRAMES, FRAMES + 2):
    found, by_chunk = losses(config(chunk=chunk), drawn | levels)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(by_chunk["mse"], metrics["mse"], rtol=1e-6)


def test_equal_levels_are_those_of_the_clip():
  one = config(per_chunk=False)
  drawn = drawn_by(denoise.denoise(one))
  assert drawn["sigma"].shape == (4,)
  levels = {
    k: np.repeat(drawn[k][:, None], 3, axis=1)
    for k in ("sigma", "timestep", "weight")
  }
  loss, _ = losses(one, drawn)
  found, _ = losses(config(), drawn | levels)
  np.testing.assert_allclose(found, loss, rtol=1e-6)
  # The mask does something.
  full, _ = losses(config(chunk=None, per_chunk=False), drawn)
  assert abs(full - loss) > 1e-5


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_loss_of_levels_by_hand(kind):
  settings = config(kind)
  drawn = drawn_by(denoise.denoise(settings), kind)
  loss, metrics = losses(settings, drawn, kind)
  x = conditioned(kind, noisy(drawn, by_frame(drawn["sigma"])), drawn)
  v = predicted(kind, CHUNK, x, by_frame(drawn["timestep"]), drawn)
  error = error_of(v, drawn)
  weight = by_frame(drawn["weight"])
  np.testing.assert_allclose(loss, (weight * error).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("level", [0.0, 0.05])
def test_teacher_forcing_is_every_chunk_after_clean_ones(kind, level):
  """Chunk by chunk: clean latents, then the noisy chunk, and its error."""
  settings = config(kind, clean=level)
  drawn = drawn_by(denoise.denoise(settings), kind)
  assert ("clean_noise" in drawn) == (level > 0)
  loss, metrics = losses(settings, drawn, kind)
  sigma = by_frame(drawn["sigma"])
  x = conditioned(kind, noisy(drawn, sigma), drawn)
  clean = drawn["deep"]
  if level:
    clean = noisy(drawn, np.full_like(sigma, level), "clean_noise")
  clean = conditioned(kind, clean, drawn)
  errors_of = []
  for chunk in CHUNKS:
    before = slice(0, chunk.start)
    timestep = by_frame(drawn["timestep"])[:, : chunk.stop].copy()
    timestep[:, before] = 1000 * level
    sequence = np.concatenate([clean[:, before], x[:, chunk]], axis=1)
    v = predicted(kind, CHUNK, sequence, timestep, drawn)[:, chunk.start :]
    errors_of.append(error_of(v, drawn, chunk))
  error = np.concatenate(errors_of, axis=1)
  weight = by_frame(drawn["weight"])
  np.testing.assert_allclose(loss, (weight * error).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)


def test_gradients_reach_what_trains():
  settings = config(phase="lora", clean=0.0)
  task = denoise.denoise(settings)
  variables = jax.jit(task.init)(jax.random.key(0))
  variables = tiny_models.random(jax.eval_shape(lambda: variables))
  drawn = drawn_by(task)
  found = jax.jit(jax.grad(lambda v: task.loss_fn(v, drawn)[0]))(variables)
  trains = tree.match(task.trainable, tree.names(variables))
  assert sum(trains.values()) > 10
  for name, gradient in tree.flatten(found).items():
    if trains[name]:
      assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_measures_see_the_clean_past():
  settings = config(clean=0.0)
  task = denoise.denoise(settings)
  drawn = drawn_by(task)
  variables = tiny_models.variables(tiny_models.module("deep_t2v"))
  found = jax.jit(task.predict_fns["measure"])(variables, drawn)
  assert {x.shape for x in found.values()} == {(4,)}
  at = dict(
    drawn,
    sigma=np.full((4, 3), 0.3, np.float32),
    timestep=np.full((4, 3), 300, np.float32),
    drop=np.zeros(4, bool),
  )
  _, metrics = jax.jit(task.loss_fn)(variables, at)
  np.testing.assert_allclose(
    found["loss_0.3"].mean(), metrics["mse"], rtol=1e-6
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"chunk": None}, "expected a config.model.chunk, found none"),
    ({"clean": 1.0}, "from 0 up to 1, found 1.0"),
    ({"clean": -0.1}, "found -0.1"),
    ({"levels": 3}, "exactly the keys clean, per_chunk"),
  ],
)
def test_forcings_that_make_no_sense(changes, message):
  with pytest.raises(errors.UserError, match=message):
    denoise.denoise(config(**changes))
