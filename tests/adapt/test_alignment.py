"""Alignment of patch embeddings, compared with torch and by properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.adapt import align
from tests.adapt import tiny_models

KINDS = [
  {"loss": "pool", "upsample": "nearest"},
  {"loss": "upsample", "upsample": "nearest"},
  {"loss": "upsample", "upsample": "linear"},
  {"loss": "global", "upsample": "nearest"},
  {"loss": "sum", "upsample": "nearest"},
  {"loss": "sum", "upsample": "linear"},
]


def random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def torch_losses(student, teacher):
  """Computes the losses as the official code does, channels first."""
  import torch
  import torch.nn.functional as F

  student, teacher = (
    torch.from_numpy(np.moveaxis(np.array(x), -1, 1))
    for x in (student, teacher)
  )
  n = teacher.shape[-1] // student.shape[-1]
  pooled = torch.nn.AvgPool3d((1, n, n), (1, n, n))(teacher)
  found = {
    "global": F.mse_loss(teacher.mean((-2, -1)), student.mean((-2, -1))),
    "pool": F.mse_loss(pooled, student),
  }
  for mode, ours in (("nearest", "nearest"), ("trilinear", "linear")):
    up = F.interpolate(student, scale_factor=(1, n, n), mode=mode)
    found["upsample", ours] = F.mse_loss(teacher, up)
    found["sum", ours] = (
      found["global"] + found["pool"] + found["upsample", ours]
    )
  return found


@pytest.mark.parity
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("config", KINDS, ids=lambda c: "-".join(c.values()))
def test_losses_of_the_official_code(config, factor):
  student = random(2, 3, 3, 5, 8)
  teacher = random(2, 3, 3 * factor, 5 * factor, 8, seed=1)
  expected = torch_losses(student, teacher)
  kind = config["loss"]
  key = kind if kind in expected else (kind, config["upsample"])
  found = align.loss(student, teacher, config)
  np.testing.assert_allclose(found, float(expected[key]), rtol=1e-5)


@pytest.mark.parametrize("name", ["base_t2v", "deep_i2v"])
def test_tokens_are_the_transformers(name):
  module = tiny_models.module(name)
  variables = tiny_models.variables(module)
  latents = random(2, 3, 4, 6, module.in_channels)
  apply = functools.partial(module.apply, mutable=["intermediates"])
  _, kept = jax.jit(apply)(
    variables,
    latents,
    jnp.zeros(2),
    random(2, 5, module.text_width),
    *([random(2, 3, 10)] if module.image_width else []),
  )
  (patches,) = kept["intermediates"]["patches"]
  found = align.tokens(variables["params"]["patch_embed"], latents)
  assert found.shape[1:4] == (3, 4 // module.patch[1], 6 // module.patch[2])
  np.testing.assert_allclose(
    found.reshape(patches.shape), patches, rtol=1e-5, atol=1e-6
  )


def test_tokens_in_half_precision_are_near():
  params = {"kernel": random(1, 2, 2, 4, 8), "bias": random(8, seed=1)}
  latents = random(2, 3, 4, 6, 4, seed=2)
  exact = align.tokens(params, latents)
  half = align.tokens(params, latents, jnp.bfloat16)
  assert half.dtype == jnp.float32 and (half != exact).any()
  np.testing.assert_allclose(half, exact, atol=0.1)


def test_condition_is_latents_mask_image():
  latents, image = random(2, 3, 4, 5, 6), random(2, 3, 4, 5, 6, seed=1)
  found = align.condition(latents, image)
  np.testing.assert_array_equal(found[..., :6], latents)
  np.testing.assert_array_equal(found[..., 10:], image)
  mask = found[..., 6:10]
  np.testing.assert_array_equal(mask[:, :1], 1)
  np.testing.assert_array_equal(mask[:, 1:], 0)


@pytest.mark.parametrize(("channels", "fan"), [(32, 32), (68, 32)])
def test_start_of_the_patch_embedding(channels, fan):
  """Xavier uniform over all inputs; the bias after the latents alone."""
  found = align.init_patch_embed(
    jax.random.key(0), (1, 1, 1), channels, 4096, fan
  )
  bound = (6 / (channels + 4096)) ** 0.5
  kernel, bias = np.asarray(found["kernel"]), np.asarray(found["bias"])
  assert kernel.shape == (1, 1, 1, channels, 4096)
  assert bound * 0.999 < np.abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.01)
  assert 0.99 / fan**0.5 < np.abs(bias).max() <= 1 / fan**0.5
  np.testing.assert_allclose(bias.std(), (3 * fan) ** -0.5, rtol=0.05)
  assert abs(bias.mean()) < 0.01


def test_start_of_a_larger_patch():
  found = align.init_patch_embed(jax.random.key(0), (1, 2, 2), 16, 4096, 16)
  assert np.abs(found["bias"]).max() <= 1 / 8
  bound = (6 / (64 + 4096)) ** 0.5
  assert bound * 0.99 < np.abs(found["kernel"]).max() <= bound


def test_measure_is_zero_at_best_and_one_for_the_mean():
  teacher = random(3, 2, 4, 6, 8) + random(8, seed=1)[None, None, None, None]
  pooled = align.pool(teacher, (2, 2, 3))
  best = align.alignment_metrics(pooled, teacher)
  np.testing.assert_allclose(best["align_relative"], 0, atol=1e-6)
  mean = jnp.broadcast_to(pooled.mean((1, 2, 3), keepdims=True), pooled.shape)
  found = align.alignment_metrics(mean, teacher)
  assert {x.shape for x in found.values()} == {(3,)}
  np.testing.assert_allclose(found["align_relative"], 1, rtol=1e-5)
  np.testing.assert_allclose(
    found["align_mse"], np.asarray(pooled).var((1, 2, 3)).mean(-1), rtol=1e-4
  )


def test_a_clip_without_variance_does_not_count():
  teacher = jnp.ones((1, 2, 4, 4, 3))
  found = align.alignment_metrics(jnp.zeros((1, 2, 2, 2, 3)), teacher)
  assert np.isnan(found["align_relative"]).all()
  np.testing.assert_allclose(found["align_mse"], 1)


@pytest.mark.parametrize(
  ("student", "teacher"),
  [
    ((3, 2, 2), (2, 4, 4)),
    ((2, 2, 2), (2, 4, 5)),
    ((2, 4, 4), (2, 2, 2)),
    ((2, 2, 2), (2, 4, 8)),
  ],
)
@pytest.mark.parametrize("kind", ["pool", "upsample", "sum"])
def test_grids_that_do_not_fit(kind, student, teacher):
  config = {"loss": kind, "upsample": "nearest"}
  with pytest.raises(errors.UserError, match="no whole multiple in space"):
    align.loss(random(1, *student, 4), random(1, *teacher, 4), config)


@pytest.mark.parametrize(
  "config",
  [
    {"loss": "downsample", "upsample": "nearest"},
    {"loss": "pool", "upsample": "cubic"},
  ],
)
def test_unknown_losses(config):
  with pytest.raises(errors.UserError, match="align.loss must be one of pool"):
    align.loss(random(1, 1, 1, 1, 4), random(1, 1, 2, 2, 4), config)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 4), (1, 2, 4, 4, 5)])
def test_latents_that_do_not_fit(shape):
  params = {"kernel": random(1, 2, 2, 4, 8), "bias": random(8)}
  with pytest.raises(errors.UserError, match="takes 4 channels in patches"):
    align.tokens(params, random(*shape))
