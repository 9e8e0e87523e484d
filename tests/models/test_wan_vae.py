"""The Wan 2.1 autoencoder against diffusers 0.42.1 (commit 58eb52c) and
Wan-Video/Wan2.1 (commit 9737cba), and its own properties."""

import functools

import flax.traverse_util
import jax
import numpy as np
import pytest

from benchmarks import wan_vae_tiles
from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import wan_vae as tables
from dcvideogen_jax.models import calls, wan_vae
from tests import golden_data, random_weights

NAME = "wan_vae_tiny"
FIELDS = {"base_width": 6}
CLOSE = 2e-5  # max abs, of latents and video
ACTIVATIONS = 1e-4
SAME = 1e-5  # between whole and streamed

# A model for tests of properties: two halvings of each axis, one block.
SMALL = {
  "latent_channels": 4,
  "base_width": 4,
  "multipliers": (1, 2, 2),
  "blocks": 1,
  "temporal": (True, True),
  "mean": (0.5, -0.5, 1, 0),
  "std": (2, 1, 0.5, 3),
}


@functools.cache
def shapes(module):
  size = module.spatial_factor
  video = jax.ShapeDtypeStruct((1, 1, size, size, 3), np.float32)
  return jax.eval_shape(module.init, jax.random.key(0), video)


@functools.cache
def load():
  weights = golden_data.weights("wan_vae", NAME)
  return convert.load("wan_vae", weights, FIELDS)


def golden():
  return golden_data.io("wan_vae", NAME)


@functools.cache
def small():
  """Returns a random model, whose norms and biases are random too."""
  module = wan_vae.build(SMALL)
  return module, random_weights.like(shapes(module), seed=0, norms=1.0)


@functools.cache
def compiled(method, model):
  module, variables = model()
  return jax.jit(functools.partial(module.apply, variables, method=method))


def run(method, x, model=load):
  return jax.tree.map(np.asarray, compiled(method, model)(x))


def video(frames, height=8, width=12):
  x = np.random.default_rng(1).uniform(-1, 1, (1, frames, height, width, 3))
  return x.astype(np.float32)


def latents(frames, height=2, width=3):
  shape = (1, frames, height, width, 4)
  return np.random.default_rng(2).normal(0, 2, shape).astype(np.float32)


def pieces(x, frames):
  return [x[:, i : i + frames] for i in range(0, x.shape[1], frames)]


def joined(parts):
  return np.concatenate([*map(np.asarray, parts)], axis=1)


def thirds(x):
  """Takes every third row and column, as entries "@s3" of golden files do."""
  return x[..., ::3, ::3, :]


def assert_close(found, expected, atol=CLOSE, **kwargs):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol, **kwargs)


# --- the reference -----------------------------------------------------------


def test_clip_equals_the_reference():
  posterior = run("encode", golden()["in.x"])
  assert_close(posterior.mean, golden()["out.T9.mean"])
  assert_close(posterior.logvar, golden()["out.T9.logvar"])
  y = thirds(run("decode", posterior.mean))
  assert_close(y, golden()["out.T9.decoded_unclamped@s3"])


@pytest.mark.parametrize("case", ["T1", "T9"])
def test_normalised_latents_equal_the_reference(case):
  module, _ = load()
  mean = golden()[f"out.{case}.mean"]
  z = module.normalise(mean)
  assert_close(z, golden()[f"out.{case}.normalized"], 1e-6)
  assert_close(module.denormalise(z), mean, 1e-6)


def test_image_and_its_activations_equal_the_reference():
  module, variables = load()

  @jax.jit
  def capture(video):
    return module.apply(variables, video, capture_intermediates=True)

  y, found = capture(golden()["in.x"][:, :1])
  found = flax.traverse_util.flatten_dict(found["intermediates"], sep="/")
  mean, logvar = np.split(found["quant_conv/__call__"][0], 2, axis=-1)
  assert_close(mean, golden()["out.T1.mean"])
  assert_close(logvar, golden()["out.T1.logvar"])
  assert_close(y, golden()["out.T1.decoded_unclamped"])

  names = [name for name in golden() if name.startswith("out.T1.act.")]
  assert len(names) == 23
  for name in names:
    ours = name.removeprefix("out.T1.act.").removesuffix("@s3")
    ours = ours.replace("blocks.", "blocks_").replace(".", "/")
    (x,) = found[f"{ours}/__call__"]
    x = x[0] if isinstance(x, tuple) else x  # Conv returns its input too.
    x = thirds(x) if name.endswith("@s3") else x
    assert_close(x, golden()[name], ACTIVATIONS, err_msg=name)


def test_streamed_equals_whole_and_the_reference():
  module, variables = load()
  x = golden()["in.x"]
  before = calls.apply._cache_size()
  parts = [*wan_vae.stream_encode(module, variables, pieces(x, 2))]
  assert [part.mean.shape[1] for part in parts] == [1, 1, 1]
  mean, logvar = (joined(values) for values in zip(*parts, strict=True))
  assert calls.apply._cache_size() - before == 2
  whole = run("encode", x)
  assert_close(mean, whole.mean, SAME)
  assert_close(logvar, whole.logvar, SAME)
  assert_close(mean[:, :2], golden()["out.T5.mean"])
  assert_close(logvar[:, :2], golden()["out.T5.logvar"])

  z = whole.mean
  parts = [*wan_vae.stream_decode(module, variables, [z[:, :2], z[:, 2:]])]
  assert [part.shape[1] for part in parts] == [1, 4, 4]
  assert calls.apply._cache_size() - before == 4
  y = joined(parts)
  assert_close(y, run("decode", z), SAME)
  expected = golden()["out.T5.decoded_unclamped@s3"]
  assert_close(thirds(y[:, :5]), expected)


def test_official_tail_is_the_reference():
  module, variables = load()
  x = golden()["in.x"][:, :8]
  parts = wan_vae.stream_encode(module, variables, [x], tail="official")
  mean, logvar = (joined(values) for values in zip(*parts, strict=True))
  assert_close(mean, golden()["out.T8_drops_frames.mean"])
  assert_close(logvar, golden()["out.T8_drops_frames.logvar"])


def in_diffusers():
  """Builds `small` in diffusers from this project's config and weights."""
  import diffusers
  import torch

  theirs = diffusers.AutoencoderKLWan.from_config(tables.config_to(SMALL))
  state_dict = {
    name: torch.from_numpy(x)
    for name, x in convert.to_torch("wan_vae", *small()).items()
  }
  theirs.load_state_dict(state_dict)  # Strictly.
  return theirs.eval().requires_grad_(False)


@pytest.mark.parity
def test_equals_the_installed_diffusers_both_ways():
  theirs = in_diffusers()
  assert wan_vae.build(tables.config_from(dict(theirs.config))) == small()[0]
  for name, value in tables.config_to(SMALL).items():
    assert theirs.config[name] == value, name

  x, z = video(9), latents(3)
  expected = theirs.encode(channels_first(x)).latent_dist
  posterior = run("encode", x, small)
  assert_close(posterior.mean, channels_last(expected.mean))
  assert_close(posterior.logvar, channels_last(expected.logvar))
  expected = theirs.decode(channels_first(z)).sample
  y = run("decode", z, small)
  assert np.abs(y).max() > 1.1
  assert_close(np.clip(y, -1, 1), channels_last(expected))


@pytest.mark.parity
def test_tiles_equal_the_installed_diffusers():
  theirs = in_diffusers()
  theirs.enable_tiling(8, 8, 4, 4)
  sides = {"tile": 8, "stride": 4}
  x, z = video(1, 4, 12), latents(1, 1, 3)
  expected = theirs.encode(channels_first(x)).latent_dist
  posterior = wan_vae_tiles.encode(*small(), x, **sides)
  assert_close(posterior.mean, channels_last(expected.mean))
  assert_close(posterior.logvar, channels_last(expected.logvar))
  assert np.abs(posterior.mean - run("encode", x, small).mean).max() > 1e-3
  expected = theirs.decode(channels_first(z)).sample
  y = wan_vae_tiles.decode(*small(), z, **sides)
  assert_close(np.clip(y, -1, 1), channels_last(expected))


def channels_first(x):
  import torch

  return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def channels_last(x):
  return np.moveaxis(x.numpy(), 1, -1)


# --- properties --------------------------------------------------------------


def test_released_model_has_the_released_size():
  module = wan_vae.build(wan_vae.VARIANTS["wan2.1"])
  leaves = jax.tree.leaves(shapes(module))
  assert sum(leaf.size for leaf in leaves) == 126_892_531
  assert len(leaves) == 194
  assert module.spatial_factor == 8 and module.temporal_factor == 4


def test_latents_see_no_future_frame():
  x = video(9).copy()
  z = run("encode", x, small).mean
  x[:, 5] += 1
  changed = run("encode", x, small).mean != z
  np.testing.assert_array_equal(changed.any((0, 2, 3, 4)), [False, False, True])


def test_frames_see_no_future_latent():
  z = run("encode", video(9), small).mean
  y = run("decode", z, small)
  changed = run("decode", z + np.eye(3)[1].reshape(1, 3, 1, 1, 1), small) != y
  changed = changed.any((0, 2, 3, 4))
  np.testing.assert_array_equal(changed, [False] + 8 * [True])


def test_bfloat16_stays_near_float32():
  module, variables = small()
  z = run("encode", video(9), small).mean
  module = module.clone(dtype=jax.numpy.bfloat16)
  apply = jax.jit(functools.partial(module.apply, method="encode"))
  rounded = apply(variables, video(9)).mean
  assert rounded.dtype == jax.numpy.bfloat16
  assert 1e-4 < np.abs(z - rounded.astype(np.float32)).max() < 0.1


@pytest.mark.parametrize(("frames", "used"), [(1, 1), (5, 5), (8, 5), (12, 9)])
def test_official_tail_drops_frames(frames, used):
  module, variables = small()

  def encode(x):
    return module.apply(variables, x, tail="official", method="encode").mean

  def exact(x):
    return module.apply(variables, x, method="encode").mean

  x = jax.ShapeDtypeStruct((1, frames, 8, 8, 3), np.float32)
  kept = jax.ShapeDtypeStruct((1, used, 8, 8, 3), np.float32)
  assert jax.eval_shape(encode, x) == jax.eval_shape(exact, kept)
  assert module.whole_frames(frames, "official") == used


@pytest.mark.parametrize(
  ("frames", "message"),
  [(0, "found 0: use 1"), (2, "use 1 or 5"), (8, "found 8: use 5 or 9")],
)
def test_frames_that_do_not_fit_are_refused(frames, message):
  module, variables = small()
  with pytest.raises(errors.UserError, match=message):
    module.apply(variables, video(frames), method="encode")


def test_streamed_frames_that_do_not_fit_are_refused_at_the_end():
  module, variables = small()
  stream = wan_vae.stream_encode(module, variables, pieces(video(7), 3))
  assert next(stream).mean.shape == (1, 1, 2, 3, 4)
  assert next(stream).mean.shape == (1, 1, 2, 3, 4)
  with pytest.raises(errors.UserError, match="found 7: use 5 or 9"):
    next(stream)


@pytest.mark.parametrize(
  ("x", "message"),
  [
    ([], "no {}"),
    ([video(4)[:, :0]], "no {}"),
    ([video(4)[0]], "b t h w c"),
    ([video(1)[:, :0], video(1, 8, 8)], "{} change"),
  ],
)
def test_video_that_does_not_fit_together_is_refused(x, message):
  module, variables = small()
  with pytest.raises(ValueError, match=message.format("frames")):
    next(wan_vae.stream_encode(module, variables, x))
  with pytest.raises(ValueError, match=message.format("latents")):
    next(wan_vae.stream_decode(module, variables, x))


def test_a_clip_continues_by_whole_latents_only():
  module, variables = small()
  with pytest.raises(errors.UserError, match="multiple of 4 frames, found 5"):
    module.apply(variables, video(5), method="encode_next", mutable=["cache"])


def test_odd_sizes_repeat_the_edge():
  x = video(9)[:, :, :7, :11]
  padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
  found = run("encode", x, small).mean
  np.testing.assert_array_equal(found, run("encode", padded, small).mean)


def test_pixels_come_clipped_and_floats_clamped_on_request():
  module, variables = small()
  z = latents(3)
  y = run("decode", z, small)
  assert np.abs(y).max() > 1.1
  clamp = functools.partial(module.apply, clamp=True, method="decode")
  expected = np.clip(y, -1, 1)
  assert_close(jax.jit(clamp)(variables, z), expected, SAME)
  found = joined(wan_vae.stream_decode(module, variables, [z], dtype="uint8"))
  assert found.dtype == np.uint8
  assert np.abs(found - (expected * 127.5 + 127.5)).max() <= 0.5 + 1e-2


def test_uint8_video_means_0_to_255():
  module, variables = small()
  pixels = np.random.default_rng(0).integers(0, 256, (1, 9, 8, 12, 3), "uint8")
  parts = wan_vae.stream_encode(module, variables, [pixels])
  found = joined([part.mean for part in parts])
  x = pixels.astype(np.float32) / 127.5 - 1
  assert_close(found, run("encode", x, small).mean, SAME)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"widht": 3}, "widht"),
    ({"blocks": 0}, "blocks is 0"),
    ({"multipliers": (1, 2)}, "2 multipliers but 2"),
    ({"multipliers": 4}, "expected a list"),
    ({"multipliers": (1, 2, -2)}, r"multipliers\[2\]"),
    ({"std": (1, 2)}, "std has 2 values"),
    ({"base_width": 3, "multipliers": (1, 1, 1)}, "3 channels"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    wan_vae.build(SMALL, **fields)
