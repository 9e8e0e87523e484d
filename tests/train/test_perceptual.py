"""Terms of the loss that need networks or latents, and batches of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, levels
from dcvideogen_jax.models import dc_ae_v, lpips
from dcvideogen_jax.train import losses, perceptual, step
from tests import random_weights

MODEL = {
  "latent_channels": 4,
  "widths": (8, 8, 8),
  "depths": (0, 1, 1),
  "chunk_frames": 4,
  "spatial_factor": 2,
  "temporal_factor": 2,
}
NETS = {"net": "vgg", "frames": 2, "measure": "alex", "start": "random"}
PLAIN = {
  "task": "autoencoder",
  "phase": "low",
  "start": "random",
  "weights": None,
  "model": MODEL,
}


def _video(frames=4, size=8):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (2, frames, size, size, 3), np.uint8)


def _run(config, batch):
  """Task, variables, drawn batch, loss and metrics."""
  task = step.build_task(PLAIN | config)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  variables = random_weights.like(shapes, norms=1.0)
  drawn = task.draw(batch, jax.random.key(3))
  loss, metrics = jax.jit(task.loss_fn)(variables, drawn)
  return task, variables, drawn, loss, metrics


@functools.cache
def _trained_by_lpips():
  batch = {"video": _video(size=32)}
  return _run({"loss": {"l1": 1.0, "lpips": 0.5}, "lpips": NETS}, batch)


def test_lpips_is_that_of_the_drawn_frames():
  task, variables, drawn, loss, metrics = _trained_by_lpips()
  assert drawn["frames"].shape == (2, 2)
  assert all(len({*row}) == 2 for row in np.asarray(drawn["frames"]).tolist())
  parts = {name: variables[name] for name in ("encoder", "decoder")}
  video = levels.to_float(drawn["video"])
  apply = random_weights.jitted(dc_ae_v.build(MODEL))
  output = apply({"params": parts}, video)
  distance = random_weights.jitted(lpips.LPIPS("vgg"))
  rows = np.arange(2)[:, None]
  some = (
    np.asarray(x)[rows, drawn["frames"]].reshape(4, 32, 32, 3)
    for x in (output, video)
  )
  each = distance({"params": variables["lpips_vgg"]}, *some)
  np.testing.assert_allclose(metrics["lpips"], each.mean(), rtol=1e-4)
  np.testing.assert_allclose(
    loss, metrics["l1"] + 0.5 * metrics["lpips"], rtol=1e-6
  )


def test_only_the_autoencoder_trains():
  task, variables, drawn, _, _ = _trained_by_lpips()
  run = step.plan(_planned())
  assert {*run.state.params} == {"encoder", "decoder"}
  assert {*run.frozen} == {"lpips_vgg", "lpips_alex"}


def _planned(**changes):
  return PLAIN | {
    "loss": {"lpips": 1.0},
    "lpips": NETS,
    "seed": 0,
    "steps": 1,
    "ema": None,
    "mesh": {"data": -1},
    "sharding": ((".*", "fsdp"),),
    "optim": {
      "name": "sgd",
      "lr": 0.1,
      "warmup": 0,
      "schedule": "constant",
      "clip": 0.0,
      "betas": (0.9, 0.99),
      "eps": 1e-8,
      "decay": 0.0,
      "decay_mask": ((".*", False),),
    },
    **changes,
  }


def test_random_networks_start_where_they_shall():
  run = step.plan(_planned())
  _, frozen = step.init(run)
  again = step.init_frozen(run)
  jax.tree.map(np.testing.assert_array_equal, frozen, again)


def test_the_other_net_measures_all_frames():
  task, variables, drawn, _, _ = _trained_by_lpips()
  found = jax.jit(task.predict_fns["measure"])(variables, drawn)
  show = jax.jit(task.predict_fns["reconstruct"])(variables, drawn)
  distance = random_weights.jitted(lpips.LPIPS("alex"))
  frames = (
    levels.to_float(np.asarray(x)).reshape(8, 32, 32, 3)
    for x in (show, drawn["video"])
  )
  each = distance({"params": variables["lpips_alex"]}, *frames)
  np.testing.assert_allclose(
    found["lpips_alex"], each.reshape(2, 4).mean(1), rtol=1e-4
  )


def test_other_frames_are_drawn_in_another_step():
  nets = perceptual.Perceptual(None, 0.0)
  drawn = {
    tuple(np.asarray(nets.draw(jax.random.key(i), 1, 9, 3))[0].tolist())
    for i in range(4)
  }
  assert len(drawn) > 1 and {*sum(drawn, ())} <= {*range(9)}
  assert not nets


def test_prefixes_hide_latent_channels_and_consistency_sees_all():
  """Against the model's own methods, for each number of channels."""
  config = {"loss": {"l1": 1.0, "latent": 0.5}, "prefixes": (1, 3)}
  _, variables, drawn, loss, metrics = _run(config, {"video": _video()})
  module = dc_ae_v.build(MODEL)
  encode, decode = (
    random_weights.jitted(module, method) for method in ("encode", "decode")
  )
  video = levels.to_float(drawn["video"])
  latents = np.asarray(encode({"params": variables}, video))
  seen = latents.copy()
  for clip, channels in enumerate(np.asarray(drawn["channels"])):
    assert channels in (1, 3)
    seen[clip, ..., channels:] = 0
  output = decode({"params": variables}, seen)
  again = np.asarray(encode({"params": variables}, output))
  consistency = np.square(again - latents).mean()
  np.testing.assert_allclose(metrics["latent"], consistency, rtol=1e-4)
  l1 = np.abs(np.asarray(output) - video).mean()
  np.testing.assert_allclose(loss, l1 + 0.5 * consistency, rtol=1e-4)


def test_consistency_does_not_pull_at_the_target():
  """The encoder moves only through what the decoder makes of its latents."""
  task = step.build_task(PLAIN | {"loss": {"mse": 1e-6, "latent": 1.0}})
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  variables = random_weights.like(shapes, norms=1.0)
  # A decoder that ignores its latents.
  variables["decoder"]["project_in"]["kernel"] *= 0
  slope = jax.jit(jax.grad(task.loss_fn, has_aux=True))
  gradients = slope(variables, {"video": _video()})[0]
  for leaf in jax.tree.leaves(gradients["encoder"]):
    np.testing.assert_array_equal(leaf, 0)
  assert np.abs(gradients["decoder"]["project_in"]["bias"]).max() > 0


def test_an_image_is_one_latent_frame():
  """As `encode_image` and `decode_image` treat it."""
  images = {"video": _video(frames=1)}
  task, variables, _, loss, metrics = _run({"loss": {"l1": 1.0}}, images)
  module = dc_ae_v.build(MODEL)
  image = levels.to_float(images["video"][:, 0])
  params = {"params": variables}
  latents = random_weights.jitted(module, "encode_image")(params, image)
  assert latents.shape == (2, 1, 4, 4, 4)
  first = random_weights.jitted(module, "decode_image")(params, latents)
  show = jax.jit(task.predict_fns["reconstruct"])(variables, images)
  assert show.shape == (2, 2, 8, 8, 3)
  difference = np.abs(show[:, 0].astype(int) - levels.to_uint8(first))
  assert difference.max() <= 1 and (difference == 0).mean() > 0.99


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"loss": {"lpips": 1.0}}, "loss.lpips has a weight, which needs the net"),
    (
      {"loss": {"lpips": 1.0}, "lpips": NETS | {"net": "squeeze"}},
      "lpips.net must be one of alex, vgg, found 'squeeze'",
    ),
    (
      {"loss": {"l1": 1.0}, "lpips": NETS | {"start": "none"}},
      "lpips.start must be one of package, random, found 'none'",
    ),
    (
      {"loss": {"l1": 1.0}, "start": "weights"},
      "phase low starts from weights: expected a model in config.weights",
    ),
    (
      {"loss": {"l1": 1.0}, "start": "inflate_centre"},
      "phase low starts from inflate_centre: expected a model",
    ),
    ({"loss": {"l1": 1.0}, "phase": "third"}, "phase must be one of low, high"),
    ({"loss": {"l1": 1.0}, "prefixes": (2, 5)}, "from 1 to the 4 latent chan"),
    ({"loss": {"gan": 0.1}}, "needs both config.discriminator"),
    (
      {"loss": {"l1": 1.0}, "data": {"frames": 6, "height": 8, "width": 8}},
      "multiple of 4 frames and 2 pixels, config.data gives 6 frames of 8x8",
    ),
    (
      {
        "loss": {"l1": 1.0, "lpips": 1.0},
        "lpips": NETS,
        "data": {"frames": 4, "height": 32, "width": 30},
      },
      "LPIPS with alex needs frames of at least 31 pixels .* 32x30",
    ),
  ],
)
def test_bad_input_is_told_before_anything_is_compiled(config, message):
  with pytest.raises(errors.UserError, match=message):
    step.build_task(PLAIN | config)


def test_half_precision_sums_in_float32():
  config = {"loss": {"l1": 1.0}}
  _, _, _, exact, _ = _run(config, {"video": _video()})
  _, _, _, half, metrics = _run(
    config | {"dtype": "bfloat16"}, {"video": _video()}
  )
  assert half.dtype == metrics["l1"].dtype == jnp.float32
  assert half != exact
  np.testing.assert_allclose(half, exact, rtol=0.02)


def test_terms_without_a_network_are_means():
  """A clip that is repeated in space has the same loss."""
  x, y = (levels.to_float(_video(size=8)[i : i + 1]) for i in (0, 1))
  wide = [jnp.concatenate([z, z], axis=2) for z in (x, y)]
  for name in ("l1", "mse", "wavelet"):
    found = losses.TERMS[name](*wide), losses.TERMS[name](x, y)
    np.testing.assert_allclose(*found, rtol=1e-5, err_msg=name)
