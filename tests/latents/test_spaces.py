"""Latents, conditions, texts and images, against the models one by one."""

import functools

import jax
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import clip_images
from dcvideogen_jax.latents import conditions, spaces, videos
from dcvideogen_jax.models import (
  bands,
  clip_vision,
  dc_ae_v,
  umt5,
  wan_vae,
)
from tests import golden_data, random_weights

DEEP = {
  "latent_channels": 4,
  "widths": [8, 8, 8],
  "depths": [0, 1, 1],
  "chunk_frames": 8,
  "spatial_factor": 2,
  "temporal_factor": 4,
  "latent_scale": 0.7,
}
BASE = golden_data.WAN_SMALL
TEXT = {
  "vocab": 20,
  "layers": 1,
  "width": 8,
  "heads": 2,
  "head_width": 4,
  "ffn_width": 8,
}
CLIP = {
  "image_size": 8,
  "patch": 4,
  "layers": 2,
  "width": 8,
  "heads": 2,
  "ffn_width": 8,
}
FRAMES = 16


def _filled(module, *arguments):
  """Returns the module with random variables."""
  return module, random_weights.of(module, *arguments)


def _zeros(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def models():
  ids = _zeros(1, 4, dtype=np.int32)
  return {
    "deep": _filled(dc_ae_v.build(DEEP), _zeros(1, 8, 2, 2, 3)),
    "base": _filled(wan_vae.build(BASE), _zeros(1, 1, 4, 4, 3)),
    "text": _filled(umt5.build(TEXT), ids, ids),
    "image": _filled(clip_vision.build(CLIP), _zeros(1, 8, 8, 3)),
  }


def _video(frames=FRAMES, height=8, width=16, batch=2, seed=0):
  random = np.random.default_rng(seed)
  shape = (batch, frames, height, width, 3)
  return random.integers(0, 256, shape, np.uint8)


def _float(video):
  return video.astype(np.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="frames")
def _jitted(name, method, module, variables, *arguments, **options):
  space = spaces.SPACES[name](module, variables)
  return getattr(space, method)(*arguments, **options)


def _whole(name, model, video):
  """Encodes whole clips, in a compiled program."""
  return _jitted(name, "encode_whole", *model, video)


def _first(name, model, image):
  """Encodes conditions of first images, in a compiled program."""
  return _jitted(name, "encode_first", *model, image, frames=FRAMES)


def _streamed(name, model, video, plan=None, frames=FRAMES):
  """Encodes a video in pieces; `plan` is for DC-AE-V."""
  space = spaces.SPACES[name](*model)
  if plan is None:
    return space.encode(video, (frames, 8, 16), 1e9)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(spaces.bands, "plan", lambda *_, **__: plan)
    return space.encode(video, (frames, 8, 16), 1e9)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(module, variables, video):
  return module.apply(variables, video, method="encode")


def _close(found, expected):
  assert found.shape == expected.shape and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("frames", "used"), [(16, 13), (13, 13), (4, 1)])
def test_base_latents_are_normalised_means(models, frames, used):
  module, variables = models["base"]
  video = _video(frames)
  posterior = _encoded(module, variables, _float(video[:, :used]))
  expected = posterior.mean - np.float32(BASE["mean"])[None, None, None, None]
  expected /= np.float32(BASE["std"])[None, None, None, None]
  _close(_whole("base", models["base"], video), expected)


@pytest.mark.parametrize("frames", [16, 12])
def test_deep_latents_are_scaled(models, frames):
  """Twelve frames are a chunk and a half."""
  module, variables = models["deep"]
  video = _video(frames)
  filled = np.concatenate(
    [video, video[:, -1:].repeat(FRAMES - frames, axis=1)], axis=1
  )
  expected = _encoded(module, variables, _float(filled))
  found = _whole("deep", models["deep"], video)
  _close(found, 0.7 * expected[:, : frames // 4])


def test_both_have_as_many_latent_frames(models):
  for k in range(4):
    video = _video(4 * (k + 1))
    for space in ("base", "deep"):
      latents = spaces.SPACES[space](*models[space]).encode_whole
      shapes = jax.eval_shape(latents, video)
      assert shapes.shape[1] == k + 1


@pytest.mark.parametrize(
  ("space", "repeats", "frames"), [("base", 1, 13), ("deep", 4, 16)]
)
def test_conditions_are_the_first_frame_amid_grey(
  models, space, repeats, frames
):
  video = _video()
  grey = np.zeros((2, frames, *video.shape[2:]), np.float32)
  grey[:, :repeats] = _float(video[:, :1])
  model, first = models[space], video[:, 0]
  _close(_first(space, model, first), _whole(space, model, grey))


@pytest.mark.parametrize("space", ["base", "deep"])
def test_conditions_are_those_of_sampling(models, space):
  """Training and sampling give a model the same conditions."""
  image = _video()[:1, 0]
  frames = 13 if space == "base" else FRAMES
  sampled = spaces.SPACES[space](*models[space])
  theirs = sampled.condition(image[0], None, frames, 1e9)
  _close(_first(space, models[space], image), np.asarray(theirs))


@pytest.mark.parametrize("half", [np.float16, "bfloat16"])
@pytest.mark.parametrize("space", ["base", "deep"])
def test_latents_are_float32_whatever_the_module(models, space, half):
  module, variables = models[space]
  video = _video()
  np.testing.assert_array_equal(
    _whole(space, (module.clone(dtype=half), variables), video),
    _whole(space, (module, variables), video),
  )


@pytest.mark.parametrize("frames", [16, 12])
def test_streaming_gives_the_base_latents(models, frames):
  video, model = _video(frames), models["base"]
  found = _streamed("base", model, videos.split(video))
  _close(found, _whole("base", model, video))


@pytest.mark.parametrize(
  ("frames", "plan"),
  [
    (16, bands.BandPlan()),
    (16, bands.BandPlan(cut=1, rows=2)),
    (12, bands.BandPlan()),
  ],
)
def test_streaming_gives_the_deep_latents(models, frames, plan):
  video, model = _video(frames), models["deep"]
  found = _streamed("deep", model, videos.split(video), plan, frames)
  _close(found, _whole("deep", model, video))


def test_conditions_are_streamed(models):
  base, deep, image = models["base"], models["deep"], _video()[:, 0]
  _close(
    _streamed("base", base, videos.condition_video(image, FRAMES, 1)),
    _first("base", base, image),
  )
  _close(
    _streamed("deep", deep, videos.condition_video(image, FRAMES, 4)),
    _first("deep", deep, image),
  )


def _tokens():
  ids = np.random.default_rng(2).integers(1, 20, (2, 4), np.int32)
  return ids, np.int32([[1, 1, 1, 0], [1, 1, 1, 1]])


_text = functools.partial(jax.jit, static_argnums=0)(conditions.text)
_image = functools.partial(jax.jit, static_argnums=0)(conditions.image)


def test_texts_end_in_zeros_and_do_not_see_padding(models):
  ids, mask = _tokens()
  found = _text(*models["text"], ids, mask)
  assert not found[0, 3].any() and found[1].any(axis=-1).all()
  short = _text(*models["text"], ids[:1, :3], mask[:1, :3])
  _close(found[:1, :3], short)


def test_everything_at_once(models):
  """One program runs all encoders; outputs of missing encoders are left out."""
  video = _video()
  ids, mask = _tokens()
  pixels = np.stack([clip_images.preprocess(x[0], 8) for x in video])
  batch = {"video": video, "ids": ids, "mask": mask, "pixels": pixels}

  def run(names):
    modules = {name: models[name][0] for name in names}
    variables = {name: models[name][1] for name in names}
    return jax.jit(lambda v, b: conditions.clips(modules, v, b))(
      variables, batch
    )

  first = video[:, 0]
  expected = {
    "text": _text(*models["text"], ids, mask),
    "image": _image(*models["image"], pixels),
  }
  for space in ("base", "deep"):
    model = models[space]
    expected |= {
      space: _whole(space, model, video),
      f"{space}_condition": _first(space, model, first),
    }
  found = run(["base", "deep", "text", "image"])
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    _close(found[name], values)
  assert run(["deep", "text"]).keys() == {"deep", "text"}


def test_sizes_are_not_padded_in_training(models):
  module, variables = models["deep"]
  side = module.spatial_factor
  video = np.zeros((1, 8, side, side + side // 2, 3), np.uint8)
  with pytest.raises(errors.UserError, match=f"multiples of {side} pixels"):
    spaces.DCAEVLatents(module, variables).encode_whole(video)


@pytest.mark.parametrize("frames", [0, 15])
def test_frames_must_fill_latents(models, frames):
  with pytest.raises(errors.UserError, match=f"multiple of 4 .* {frames}"):
    spaces.DCAEVLatents(*models["deep"]).clip_frames(frames)
