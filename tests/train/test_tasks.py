"""The autoencoder tasks, a starting point and their pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from dcvideogen_jax import errors, levels, tree
from dcvideogen_jax.models import dc_ae_v, wan_vae
from dcvideogen_jax.train import losses, step, validation, warm_starts

WAN = {
  "task": "wan_autoencoder",
  "start": "random",
  "weights": None,
  "model": {
    "latent_channels": 3,
    "base_width": 8,
    "multipliers": (1, 1),
    "blocks": 1,
    "temporal": (True,),
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
  },
  "loss": {"l1": 1.0, "mse": 0.5, "kl": 0.25},
}


@pytest.fixture
def small():
  config = tiny.get_config("autoencoder,runlocal").to_dict()
  config["model"]["chunk_frames"] = 4
  return config


def _video(shape=(2, 4, 16, 16, 3)):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, shape, np.uint8)


def test_uint8_and_float_are_inverse():
  values = np.arange(256, dtype=np.uint8)
  video = levels.to_float(values)
  assert (float(video[0]), float(video[-1])) == (-1.0, 1.0)
  np.testing.assert_array_equal(levels.to_uint8(video), values)
  np.testing.assert_array_equal(
    levels.to_uint8(jnp.array([-9.0, 9.0])), [0, 255]
  )


def _predictions(task, params, batch, frames):
  """Checks that "measure" measures what "reconstruct" shows."""
  output = jax.jit(task.predict_fns["reconstruct"])(params, batch)
  original = batch["video"][:, :frames]
  assert output.dtype == jnp.uint8 and output.shape == original.shape
  found = jax.jit(task.predict_fns["measure"])(params, batch)
  expected = losses.psnr(*map(levels.to_float, (output, original)))
  np.testing.assert_allclose(found["psnr"], expected, rtol=1e-6)
  assert found["ssim"].shape == (2,)
  return output


def test_loss_and_predictions_agree(small):
  task = step.build_task(small)
  params = jax.jit(task.init)(jax.random.key(0))
  batch = {"video": jnp.asarray(_video())}
  loss, metrics = jax.jit(task.loss_fn)(params, batch)
  np.testing.assert_allclose(loss, metrics["l1"] + metrics["mse"], rtol=1e-6)
  _predictions(task, params, batch, frames=4)


def test_the_wan_autoencoder_trains_samples_and_measures_means():
  task, module = step.build_task(WAN), wan_vae.build(WAN["model"])
  params = jax.jit(task.init)(jax.random.key(0))
  batch = {"video": jnp.asarray(_video())}
  drawn = jax.jit(task.draw)(batch, jax.random.key(1))
  assert drawn["noise"].shape == (2, 2, 8, 8, 3)
  loss, metrics = jax.jit(task.loss_fn)(params, drawn)

  @jax.jit
  def expected(params, video, noise):
    decode, encode = (
      functools.partial(module.apply, {"params": params}, method=name)
      for name in ("decode", "encode")
    )
    mean, logvar = encode(video)
    sample = decode(mean + jnp.exp(logvar / 2) * noise)
    return mean, logvar, sample, levels.to_uint8(decode(mean))

  video = levels.to_float(batch["video"][:, :3])
  mean, logvar, sample, output = expected(params, video, drawn["noise"])
  logvar, mean = (np.asarray(x, np.float64) for x in (logvar, mean))
  kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
  l1, mse = losses.l1(sample, video), losses.mse(sample, video)
  np.testing.assert_allclose(loss, l1 + 0.5 * mse + 0.25 * kl, rtol=1e-5)
  assert set(metrics) == {"psnr", "kl", "l1", "mse"}
  # Where a value is halfway between two levels, rounding decides.
  shown = _predictions(task, params, batch, frames=3)
  assert np.abs(shown.astype(int) - output).max() <= 1
  assert (shown == output).mean() > 0.99


@pytest.mark.parametrize(
  "shape", [(1, 3, 16, 16, 3), (1, 4, 18, 16, 3), (1, 4, 16, 17, 3)]
)
def test_clips_that_would_be_padded_are_refused(small, shape):
  task = step.build_task(small)
  params = jax.eval_shape(task.init, jax.random.key(0))
  batch = {"video": jax.ShapeDtypeStruct(shape, jnp.uint8)}
  with pytest.raises(errors.UserError, match="multiple of 4 frames and 4"):
    jax.eval_shape(task.loss_fn, params, batch)


def test_clips_that_the_wan_autoencoder_would_pad_are_refused():
  batch = {"video": jax.ShapeDtypeStruct((1, 5, 15, 16, 3), jnp.uint8)}
  with pytest.raises(errors.UserError, match="multiple of 2 pixels"):
    jax.eval_shape(step.build_task(WAN).draw, batch, jax.random.key(0))


@pytest.mark.parametrize(
  "change",
  [
    {"task": "fly"},
    {"start": "warm"},
    {"model": {"widths": (1, 2)}},
    {"model": {"colour": "red"}},
    {"task": "wan_autoencoder"},
  ],
)
def test_a_config_that_does_not_fit(small, change):
  with pytest.raises(errors.UserError):
    step.build_task(small | change)


@pytest.mark.parametrize("time", ["chunk_causal", "causal", "non_causal"])
def test_shortcuts_start_with_the_mean_of_each_block(time):
  """A random start knows neither left from right nor then from now."""
  fields = tiny.get_config(f"autoencoder,time={time}").model.to_dict()
  module = dc_ae_v.build(fields)
  rng = np.random.default_rng(0)
  colours = rng.uniform(-0.9, 0.9, (2, 2, 2, 2, 3)).astype(np.float32)
  video = jnp.asarray(colours.repeat(4, 1).repeat(32, 2).repeat(32, 3))
  init = jax.jit(module.init)
  params = init(jax.random.key(0), video[:1, :, :32, :32])["params"]
  started = warm_starts.through_shortcuts(params, time)
  assert tree.shapes(started) == tree.shapes(params)
  apply = jax.jit(module.apply)
  outputs = [np.asarray(apply({"params": p}, video)) for p in (params, started)]
  random, ours = (
    np.corrcoef(output.ravel(), np.asarray(video).ravel())[0, 1]
    for output in outputs
  )
  assert ours > 0.7 > 0.3 > random


def test_strip_shows_original_reconstruction_and_error():
  original, output = _video(), _video()[:, :, ::-1]
  picture = validation.comparison_image(original, output, clips=1, frames=2)
  assert picture.shape == (3 * 16 + 2 * 2, 2 * 16 + 2, 3)
  np.testing.assert_array_equal(picture[:16, :16], original[0, 0])
  np.testing.assert_array_equal(picture[18:34, 18:], output[0, 3])
  error = 4 * np.abs(original[0, 0].astype(int) - output[0, 0])
  np.testing.assert_array_equal(picture[36:, :16], error.clip(0, 255))


def test_a_strip_of_different_shapes_is_refused(wrong_shapes):
  with pytest.raises(errors.UserError, match="was reconstructed as"):
    validation.comparison_image(_video(), _video((2, 4, 16, 14, 3)))
