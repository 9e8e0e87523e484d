"""Videos during a training are those that sampling makes of its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.adapt import align
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.latents import denoiser, spaces
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.sample import loading, pipeline
from dcvideogen_jax.train import rendering
from tests.sample import published

# Frames, height and width for each autoencoder.
SIZES = {"dc": (12, 8, 16), "wan": (5, 16, 32)}
STEPS, GUIDANCE, SHIFT = 3, 2.5, 4.0


def size(name):
  return SIZES[name.partition("_")[0]]


def autoencoder(name):
  if name.startswith("dc"):
    return spaces.DCAEVLatents(*published.model("dc_ae_v")[1:])
  return spaces.WanVAELatents(*published.model("wan_vae")[1:])


def settings(name, guidance=GUIDANCE, batch_size=2):
  options = flow.Options("unipc", {}, SHIFT, "wan")
  plan = sampler.plan(options.schedule(STEPS), "unipc")
  return rendering.Settings(plan, guidance, *size(name), batch_size)


def renderer(name, **changes):
  module = published.model("wan_dit", name).module
  return rendering.Renderer(
    module, autoencoder(name), settings(name, **changes)
  )


def requests(name, made, count, seed=0):
  random = np.random.default_rng(seed)

  def draw(*shape):
    return random.normal(size=shape).astype(np.float32)

  found = rendering.Requests(
    draw(count, 6, published.TEXT_WIDTH),
    draw(6, published.TEXT_WIDTH),
    np.asarray(denoiser.noise(range(count), made.shape)),
  )
  if name.endswith("i2v"):
    frames, *pixels = size(name)
    images = random.integers(0, 256, (count, *pixels, 3), np.uint8)
    space = autoencoder(name)
    conditions = [rendering.condition(space, x, frames) for x in images]
    found = found._replace(
      image=draw(count, 5, 1280), condition=np.stack(conditions)
    )
    return found, images
  return found, None


def sampled(name, asked, images):
  """The same by the pipeline, one after another."""
  dit, space = published.model("wan_dit", name), autoencoder(name)
  made = pipeline.DCVideoGen(
    loading.Parts(loading.LoadedModel(*dit[1:]), space)
  )
  frames, height, width = size(name)
  videos = []
  for i, text in enumerate(asked.text):
    condition = None
    if images is not None:
      mask = np.zeros((*asked.condition.shape[1:-1], 4), np.float32)
      mask[0] = 1
      extra = np.concatenate([mask, asked.condition[i]], axis=-1)
      condition = {"image": asked.image[i : i + 1], "extra": extra[None]}
    result = made.generate(
      text[None],
      negative_prompt=asked.negative[None],
      condition=condition,
      height=height,
      width=width,
      frames=frames,
      steps=STEPS,
      guidance_scale=GUIDANCE,
      shift=SHIFT,
      seed=i,
      one_program=True,
    )
    videos.append(result.video()[0])
  return np.stack(videos)


@pytest.mark.parametrize("name", ["wan_t2v", "dc_i2v"])
def test_is_what_sampling_makes(name):
  """Three videos in batches of two."""
  made = renderer(name)
  asked, images = requests(name, made, 3)
  variables = published.model("wan_dit", name).variables
  found = made.videos({**variables, "encoders": {"text": 0}}, asked)
  expected = sampled(name, asked, images)
  assert found.shape == expected.shape and found.dtype == np.uint8
  # A level next to a half may be rounded either way.
  assert np.abs(found.astype(int) - expected).max() <= 1
  assert found.std() > 5 and np.abs(found[0] - found[1]).max() > 5


@pytest.mark.parametrize("name", ["dc_i2v", "wan_i2v"])
def test_conditions_are_those_of_sampling(name):
  space, (frames, *pixels) = autoencoder(name), size(name)
  image = np.random.default_rng(1).integers(0, 256, (*pixels, 3), np.uint8)
  expected = space.condition(image, None, frames, 1e9)
  found = rendering.condition(space, image, frames)
  np.testing.assert_allclose(found[None], expected, atol=1e-5)


def test_on_a_mesh_and_again():
  """Split over devices, and without a new program for other parameters."""
  made = renderer("dc_t2v")
  asked, _ = requests("dc_t2v", made, 3)
  variables = published.model("wan_dit", "dc_t2v").variables
  expected = np.concatenate(list(made.latents(variables, asked)))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  where = sharding.shardings(variables, mesh, [(".*", "fsdp")])
  split = jax.device_put(variables, where)
  with jax.set_mesh(mesh):
    found = np.concatenate(list(made.latents(split, asked)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    half = jax.tree.map(lambda x: x / 2, split)
    other = np.concatenate(list(made.latents(half, asked)))
    videos = made.videos(split, asked)
  assert np.abs(other - expected).max() > 1e-3
  assert [p._cache_size() for p in made._programs.values()] == [1, 1]
  np.testing.assert_allclose(
    videos.astype(int), made.videos(variables, asked), atol=1
  )


def test_low_rank_updates_count_and_guidance_of_one_is_none():
  fields = published.DIT["dc_t2v"]
  module = wan_dit.build(fields, lora_rank=2, lora_alpha=4.0)
  made = rendering.Renderer(
    module, autoencoder("dc_t2v"), settings("dc_t2v", guidance=1)
  )
  asked, _ = requests("dc_t2v", made, 1)
  variables = dict(published.model("wan_dit", "dc_t2v").variables)
  shapes = jax.eval_shape(
    module.init,
    jax.random.key(0),
    jnp.zeros((1, *made.shape)),
    jnp.zeros(1),
    jnp.zeros((1, 6, published.TEXT_WIDTH)),
  )
  latents_of = functools.partial(made.latents, requests=asked)
  plain = next(latents_of(variables))
  other = asked._replace(negative=2 * asked.negative)
  np.testing.assert_array_equal(plain, next(made.latents(variables, other)))
  zero = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["lora"])
  found = next(latents_of({**variables, "lora": zero}))
  np.testing.assert_allclose(found, plain, atol=1e-6)
  some = jax.tree.map(lambda x: x + np.float32(0.3), zero)
  found = next(latents_of({**variables, "lora": some}))
  assert np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize(
  ("name", "wanted", "message"),
  [
    ("dc_t2v", (13, 8, 8), "videos of 4k frames and multiples of 4 pixels"),
    ("dc_t2v", (0, 8, 8), "found 0 frames of 8x8"),
    ("wan_t2v", (12, 16, 16), r"videos of 1 \+ 4k frames and multiples of 8"),
    ("wan_t2v", (5, 8, 8), r"patches \(1, 2, 2\) and 4 channels cannot"),
  ],
)
def test_sizes_that_do_not_fit(name, wanted, message):
  plan = settings(name).plan
  module = published.model("wan_dit", name).module
  given = rendering.Settings(plan, 1.0, *wanted, 2)
  with pytest.raises(errors.UserError, match=message):
    rendering.Renderer(module, autoencoder(name), given)


@pytest.mark.parametrize("name", ["dc_t2v", "dc_i2v"])
def test_chunks_are_made_one_after_the_other(name):
  """Each with the whole clean prefix, under the block-causal mask."""
  module, variables = published.model("wan_dit", name)[1:]
  module = module.clone(chunk=2)
  made = rendering.Renderer(module, autoencoder(name), settings(name))
  asked, _ = requests(name, made, 2)
  assert made.shape[0] == 3  # The last chunk is shorter.
  found = np.concatenate(list(made.latents(variables, asked)))
  clean = asked.noise[:, :0]
  for chunk in (asked.noise[:, :2], asked.noise[:, 2:]):

    def model(x, t, text, clean=clean):
      known = np.zeros((2, clean.shape[1]), np.float32)
      now = jnp.broadcast_to(t[:, None], x.shape[:2])
      t = jnp.concatenate([known, now], axis=1)
      x = jnp.concatenate([clean, x], axis=1)
      if asked.condition is not None:
        x = align.condition(x, asked.condition[:, : x.shape[1]])
      v = module.apply(variables, x, t, text, asked.image)
      return v[:, clean.shape[1] :]

    def velocity(x, t, model=model):
      negative = np.broadcast_to(asked.negative, asked.text.shape)
      base = model(x, t, negative)
      return base + GUIDANCE * (model(x, t, asked.text) - base)

    run = functools.partial(sampler.sample, velocity)
    new = jax.jit(run)(chunk, made._settings.plan)
    clean = np.concatenate([clean, new], axis=1)
  np.testing.assert_allclose(found, clean, rtol=0, atol=1e-4)
