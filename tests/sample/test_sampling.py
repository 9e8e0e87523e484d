"""The pipeline's promises: sizes, seeds, batches, memory, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.latents import denoiser, spaces
from dcvideogen_jax.sample import arguments, denoise, options, pipeline
from tests.sample.small import NEGATIVE, PHOTO, TEXT, make, run


@pytest.fixture(scope="module")
def t2v():
  return make()


@pytest.mark.parametrize("frames", [1, 9, 10])
def test_sizes_are_honoured(t2v, frames):
  result = run(t2v, frames=frames)
  assert result.latents.shape == (1, -(-frames // 4), 3, 5, 4)
  video = result.video()
  assert video.shape == (1, frames, 10, 18, 3) and video.dtype == np.uint8
  assert video.std() > 1


def test_official_rule_rounds_down(t2v):
  result = run(t2v, size_rule="official")
  assert result.size == (8, 8, 16)
  assert result.video().shape == (1, 8, 8, 16, 3)
  assert t2v.latent_shape(result.size) == (2, 2, 4, 4)
  with pytest.raises(errors.UserError, match="leaves nothing"):
    run(t2v, size_rule="official", height=3)


def test_a_seed_is_a_video(t2v):
  first, again, other = (run(t2v, seed=s).latents for s in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.1


def test_explicit_levels_with_fresh_noise(t2v):
  """A sample's fresh noise, too, comes from its own seed alone."""
  how = flow.Options("renoise", {}, 5.0, "wan", levels=(1.0, 0.8, 0.4))
  given = {"options": how, "steps": None, "guidance_scale": 1.0}
  texts = np.concatenate([TEXT, TEXT])
  together = run(t2v, prompt=texts, seed=[3, 4], **given)
  for i, seed in enumerate((3, 4)):
    alone = run(t2v, seed=seed, one_program=bool(i), **given)
    np.testing.assert_allclose(
      together.latents[i : i + 1], alone.latents, atol=1e-5
    )
  told = together.settings
  assert (told["steps"], told["solver"], told["grid"]) == (3, "renoise", None)
  assert told["levels"] == [1.0, 0.8, 0.4] and told["shift"] is None
  # Other noise than that of the start is drawn, even if the start is given.
  noise = denoiser.noise([3], together.latents.shape[1:])
  other = run(t2v, noise=noise, seed=5, **given).latents
  assert np.abs(other - together.latents[:1]).max() > 0.1
  with pytest.raises(errors.UserError, match="are not shifted"):
    run(t2v, shift=3.0, **given)


def test_a_batch_is_its_samples(t2v):
  texts = np.concatenate([TEXT, NEGATIVE])
  together = run(t2v, prompt=texts, seed=[3, 4]).latents
  for i, seed in enumerate((3, 4)):
    alone = run(t2v, prompt=texts[i : i + 1], seed=seed).latents
    np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)


def test_given_noise(t2v):
  noise = np.random.default_rng(0).normal(size=(1, 3, 3, 5, 4))
  first = run(t2v, noise=noise, seed=1)
  np.testing.assert_array_equal(
    first.latents, run(t2v, noise=noise, seed=2).latents
  )
  assert first.settings["seeds"] is None
  with pytest.raises(errors.UserError, match="noise must have the shape"):
    run(t2v, noise=noise[:, :2])


def test_one_program_equals_steps(t2v):
  steps = []
  seen = run(t2v, steps=3, on_step=lambda i, x: steps.append(i))
  whole = run(t2v, steps=3, one_program=True)
  assert steps == [0, 1, 2]
  np.testing.assert_allclose(seen.latents, whole.latents, atol=1e-5)


def test_guidance_together_equals_in_turn(t2v, monkeypatch):
  together = run(t2v).latents
  monkeypatch.setattr(denoise, "_BATCHED_TOKENS", 0)
  in_turn = run(t2v).latents
  np.testing.assert_allclose(together, in_turn, atol=1e-5)


def test_guidance_of_one_needs_no_negative(t2v):
  plain = run(t2v, guidance_scale=1).latents
  np.testing.assert_array_equal(
    plain, run(t2v, guidance_scale=1, negative_prompt=TEXT).latents
  )
  assert np.abs(plain - run(t2v).latents).max() > 1e-3


@pytest.mark.parametrize(
  ("changes", "solver", "shift", "grid"),
  [
    ({}, "unipc", 5.0, "wan"),
    ({"shift": 1.0}, "unipc", 1.0, "wan"),
    (
      {"options": flow.Options("euler", {}, 5.0, "wan")},
      "euler",
      5.0,
      "wan",
    ),
    (
      {"options": flow.Options("unipc", {}, 3.0, "diffusers_0_37")},
      "unipc",
      3.0,
      "diffusers_0_37",
    ),
  ],
)
def test_options_are_those_of_the_solver(t2v, changes, solver, shift, grid):
  """The steps are those of a plan that is made here."""
  found = run(t2v, steps=4, **changes)
  module, variables = t2v.parts.transformer
  plan = sampler.plan(flow.schedule(4, shift, grid=grid), solver)
  step = denoise.jit_step(module, True, True, None)
  noise = denoiser.noise([0], (3, 3, 5, 4))
  texts = {"text": TEXT}, {"text": NEGATIVE}
  steps = sampler.stream(
    step, noise, plan, variables, np.float32(5), *texts, ()
  )
  *_, (_, expected) = steps
  np.testing.assert_allclose(found.latents, expected, rtol=0, atol=1e-5)
  assert found.settings["grid"] == grid


def test_texts_are_read_once_and_padding_is_zero():
  made = make(texts=True)
  tokenizer = made.parts.texts.tokenizer
  run(made, prompt="a cat", negative_prompt="bad")
  run(made, prompt=["a cat", " a  cat "], negative_prompt=None, seed=[0, 1])
  assert tokenizer.asked[:2] == ["a cat", "bad"]
  assert len(tokenizer.asked) == 3  # The third is Wan's negative prompt.
  text = made.embed(["a cat"])
  assert text.shape == (1, 10, 8)
  assert np.abs(text[0, :6]).min() > 0 and not np.any(text[0, 6:])


def test_text_encoder_can_go():
  made = make(texts=True)
  before = run(made, prompt="a cat", negative_prompt="bad").latents
  leaves = jax.tree.leaves(made.parts.texts.encoder.variables)
  made.free_text_encoder()
  assert all(leaf.is_deleted() for leaf in leaves)
  after = run(made, prompt="a cat", negative_prompt="bad").latents
  np.testing.assert_array_equal(before, after)
  with pytest.raises(errors.UserError, match="no text encoder for 'a dog'"):
    run(made, prompt="a dog")


def test_phases_are_told(t2v):
  told = []

  def phase(name):
    told.append(name)
    return options.no_phase(name)

  result = run(t2v, phase=phase)
  assert told == ["text", "compile", "denoise"]
  chunks = list(result.chunks())
  assert set(told[3:]) == {"decode"} and len(chunks) == 2


def test_decoding_is_lazy_and_of_one_sample(t2v):
  texts = np.concatenate([TEXT, NEGATIVE])
  result = run(t2v, prompt=texts, seed=[3, 4])
  (first, *_), whole = result.chunks(1), result.video()
  assert first.shape[0] == 1
  np.testing.assert_array_equal(first, whole[1:2, : first.shape[1]])


def test_a_video_is_saved(t2v, tmp_path):
  path = tmp_path / "v.mp4"
  run(t2v).save(path, crf=0)
  info = pipeline.generation.video_files.probe(path)
  assert (info.frames, info.height, info.width, info.fps) == (10, 10, 18, 16)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"height": 0}, "height must be at least 1, found 0"),
    ({"frames": -1}, "frames must be at least 1, found -1"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"width": None}, "both height and width"),
    ({"image": PHOTO}, "takes no image"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"negative_prompt": np.repeat(TEXT, 2, 0)}, "expected 1 prompt, found 2"),
    ({"noise": "x"}, "noise must have the shape"),
    ({"seed": 2**32}, "a seed is from 0"),
    ({"prompt": []}, "expected prompts"),
    ({"prompt": "a cat"}, "no text encoder"),
    ({"prompt": TEXT[..., :5]}, "embeddings"),
    ({"seed": [1, 2]}, "a seed per prompt"),
    ({"size_rule": "nearest"}, "size_rule"),
    ({"condition_tail": "zero"}, "condition_tail must be one of pad, official"),
    ({"steps": 2.0}, "steps must be at least 1, found 2.0"),
    ({"shift": "high"}, "shift must be a finite number, found 'high'"),
    ({"shift": float("nan")}, "shift must be a finite number, found nan"),
    ({"shift": -1}, "flow shift must be positive, found -1"),
    ({"guidance_scale": True}, "guidance_scale must be a finite number"),
    ({"seed": 1.5}, "seeds are whole numbers, found 1.5"),
    ({"seed": "one"}, "seeds are whole numbers, found 'one'"),
    ({"prompt": 7}, "expected prompts, found 7"),
    ({"prompt": TEXT[:, :0]}, "text embeddings"),
    ({"prompt": np.nan * TEXT}, "text embeddings must be finite"),
    ({"prompt": TEXT.astype(int)}, "text embeddings must be floats, found int"),
    ({"noise": np.full((1, 3, 3, 5, 4), np.inf)}, "the noise must be finite"),
    ({"height": 10**6}, "height must be at most 65536, found 1000000"),
    ({"frames": 10**12}, "too large, expected fewer frames"),
    ({"one_program": True, "on_step": print}, "cannot call on_step"),
  ],
)
def test_refusals(t2v, changes, message):
  with pytest.raises(errors.UserError, match=message):
    run(t2v, **changes)


def test_numbers_of_numpy_are_welcome():
  assert arguments.steps(np.int64(4)) == 4
  assert arguments.number(np.float32(2.5), "x") == 2.5
  assert arguments.noise(None, np.int32(3), (2, 1))[1] == [3, 3]


def test_a_sample_that_is_not_there(t2v):
  with pytest.raises(errors.UserError, match="1 samples, found number 1"):
    run(t2v).chunks(1)


def test_the_budget_is_shared_by_the_batch(t2v, monkeypatch):
  asked = []

  def plan(module, height, width, budget, **_):
    asked.append(budget)
    return spaces.bands.BandPlan()

  monkeypatch.setattr(spaces.bands, "plan", plan)
  texts = np.concatenate([TEXT, NEGATIVE])
  run(t2v, prompt=texts, seed=[3, 4], memory_budget=8e6).video()
  assert asked == [4e6]


def test_wan_s_autoencoder_decodes_in_float32(monkeypatch):
  seen = []
  monkeypatch.setattr(
    spaces.wan_vae,
    "stream_decode",
    lambda module, *_, **__: seen.append(module.dtype) or iter(()),
  )
  module = spaces.wan_vae.build({"base_width": 4})
  space = spaces.WanVAELatents(module, {})
  z = jnp.zeros((1, 1, 1, 1, 16))
  list(space.decode(z, pipeline.sizes.Size(1, 8, 8), jnp.bfloat16, 1e9))
  assert seen == [jnp.float32]
  assert space.decoder(jnp.bfloat16).dtype == jnp.float32  # What is planned.


def test_deep_latents_are_decoded_in_the_pipeline_s_dtype(t2v):
  assert t2v.parts.space.decoder(jnp.bfloat16).dtype == jnp.bfloat16


def test_parts_that_do_not_fit():
  with pytest.raises(errors.UserError, match="has 4 channels.* found 6 and 4"):
    make(in_channels=6)
