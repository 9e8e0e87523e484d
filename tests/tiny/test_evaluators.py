"""Evaluators: requests, scores and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.tiny import evaluators, scorer, world
from tests.adapt import runs, tiny_models
from tests.sample import published

SIZE = (8, 16, 16)
_FIELDS = tiny_models.FIELDS["deep_t2v"] | {
  "text_width": 64,
  "in_channels": 4,
  "out_channels": 4,
}


class Rendered:
  """Stands in for a renderer: its videos show exactly the given questions."""

  def __init__(self, questions, frames=16):
    self.videos = lambda variables, requests: np.stack(
      [world.render(q.scene, q.seed, frames) for q in questions]
    )


def test_a_perfect_model_has_every_point():
  questions = scorer.questions(12)
  score = evaluators.Evaluator(
    "truth",
    5,
    Rendered(questions),
    None,
    shown=6,
    scenes=[q.scene for q in questions],
  )
  metrics, images = score({}, 1)
  assert score.every == 5
  assert [*metrics] == [
    f"truth/{x}" for x in ("colour", "shape", "motion", "all")
  ]
  assert min(metrics.values()) == 1.0
  (picture,) = images.values()
  # Two rows of at most four videos, four frames each.
  assert picture.shape == (2 * 66 - 2, 4 * (4 * 64 + 2) - 2, 3)
  assert picture.dtype == np.uint8 and [*images] == ["truth"]


def test_what_is_wrong_costs_points():
  questions = list(scorer.questions(12))
  scenes = [q.scene for q in questions]
  wrong = {"colour": (0, 1), "shape": (1, 2, 3, 4), "motion": (4, 5, 6)}
  names = (world.COLOURS, world.SHAPES, world.MOTIONS)
  for (fact, places), known in zip(wrong.items(), names, strict=True):
    for i in places:
      scene = questions[i].scene
      other = next(x for x in known if x != getattr(scene, fact))
      scene = scene._replace(**{fact: other})
      questions[i] = questions[i]._replace(scene=scene)
  score = evaluators.Evaluator("x", 5, Rendered(questions), None, scenes=scenes)
  metrics, _ = score({}, 1)
  assert metrics == pytest.approx(
    {
      "x/colour": 10 / 12,
      "x/shape": 8 / 12,
      "x/motion": 9 / 12,
      "x/all": 5 / 12,
    }
  )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns the paths of an evaluator's frozen models."""
  path = tmp_path_factory.mktemp("models")
  published.save(path / "autoencoder", published.model("dc_ae_v"), None)
  return {
    "autoencoder": str(path / "autoencoder"),
    "text_encoder": str(published.TINY / "text_encoder"),
    "tokenizer": str(published.TINY / "tokenizer"),
    "image_encoder": None,
  }


def config(models, **changes):
  """Returns a run's config with one evaluator, "score", of four scenes."""
  wanted = {
    "what": "semantic",
    "prompts": 4,
    "images": (),
    "every": 10,
    **dict(zip(("frames", "height", "width"), SIZE, strict=True)),
    "solver": "unipc",
    "steps": 2,
    "shift": 5.0,
    "guidance": 3.0,
    "seed": 0,
    "batch_size": 2,
    "text_tokens": 24,
    **models,
    **changes,
  }
  return runs.config("scratch", model=_FIELDS, evaluators={"score": wanted})


def variables(config):
  module = evaluators.weights.build(config, evaluators.phases.find("scratch"))
  return tiny_models.variables(module, scale=0.5)


def test_an_evaluator_of_a_run(models):
  c = config(models)
  (score,) = evaluators.build(c)
  metrics, images = score(variables(c), 1)
  again, same = score(variables(c), 2)
  assert metrics == again
  np.testing.assert_array_equal(images["score"], same["score"])
  assert images["score"].shape == (16, 4 * (4 * 16 + 2) - 2, 3)
  _, other = score(jax.tree.map(jnp.zeros_like, variables(c)), 1)
  assert (images["score"] != other["score"]).mean() > 0.5
  # Random weights show no scene: the scenes that are asked for have all points.
  score._renderer = Rendered(scorer.questions(4))
  assert {*score({}, 3)[0].values()} == {1.0}
  (moved,) = evaluators.build(config(models, seed=1))
  np.testing.assert_array_equal(
    moved._requests.noise[:-1], score._requests.noise[1:]
  )
  assert evaluators.build(runs.config("scratch")) == []


def test_texts_are_embedded_as_by_sampling(models):
  prompts = ["a red ball rolls", "a blue cat"]
  found = evaluators.embed(
    models["text_encoder"], models["tokenizer"], prompts, 24
  )
  assert found.shape == (2, 24, 64)
  loaded = convert.load("umt5", models["text_encoder"])
  tokenizer = tokenize.Tokenizer.from_directory(models["tokenizer"])
  expected = conditions.encode_text(*loaded, *tokenizer(prompts, 24))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_image_to_video_starts_from_pictures(models, tmp_path):
  photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
  paths = [tmp_path / "a.png", tmp_path / "b.png"]
  for path, image in zip(paths, (photo, photo[::-1]), strict=True):
    PIL.Image.fromarray(image).save(path)
  clip = str(published.TINY / "image_encoder")
  c = config(
    {**models, "image_encoder": clip},
    what="samples",
    prompts=("a cat", "a cat"),
    images=[str(path) for path in paths],
  )
  c["model"] = _FIELDS | {"in_channels": 12, "image_width": 64}
  (samples,) = evaluators.build(c)
  requests = samples._requests
  assert requests.image.shape[::2] == (2, 64)
  assert requests.condition.shape == (2, 2, 4, 4, 4)
  np.testing.assert_array_equal(requests.text[0], requests.text[1])
  for both in (requests.image, requests.condition, requests.noise):
    assert np.abs(both[0] - both[1]).max() > 1e-3
  metrics, images = samples(variables(c), 1)
  assert metrics == {} and [*images] == ["score"]
  # Scenes of the world have first frames of their own.
  c["evaluators"]["score"] |= {"what": "semantic", "prompts": 1, "images": ()}
  (score,) = evaluators.build(c)
  assert np.abs(score._requests.condition - requests.condition).max() > 1e-3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"what": "dance"},
      "score.what must be samples or semantic, found 'dance'",
    ),
    ({"prompts": 0}, "at least one prompt, found 0"),
    ({"images": ["a.png"]}, "score.images are for samples"),
    ({"what": "samples", "prompts": ()}, "score.prompts: there are none"),
    ({"solver": "heun"}, "solvers are unipc, dpm"),
    ({"frames": 9}, "videos of 4k frames"),
    ({"autoencoder": "/gone"}, "there is no file or directory /gone"),
    ({"autoencoder": None}, "evaluators.score needs autoencoder, found none"),
  ],
)
def test_refusals(models, changes, message):
  with pytest.raises(errors.UserError, match=message):
    evaluators.build(config(models, **changes))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"text_width": 12}, "gives texts of width 64, the transformer takes 12"),
    ({"in_channels": 12, "image_width": 64}, "needs an image_encoder"),
    ({"out_channels": 6}, "6 channels cannot make latents"),
  ],
)
def test_transformers_that_do_not_fit(models, fields, message):
  c = config(models)
  c["model"] = _FIELDS | fields
  with pytest.raises(errors.UserError, match=message):
    evaluators.build(c)


def test_other_tasks_have_no_samples(models):
  c = config(models) | {"task": "align"}
  with pytest.raises(errors.UserError, match="task denoise or distil, found"):
    evaluators.build(c)
