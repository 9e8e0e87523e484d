"""The way `few` of the page: its form, its estimate and its transformer."""

import pathlib
import shlex
import shutil
import weakref

import jax
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.app import estimates, forms, loads, runs
from dcvideogen_jax.diffusion import few, guidance
from dcvideogen_jax.plan import formulas
from dcvideogen_jax.sample import few_steps, model_names, presets

SERVED = forms.Served("tiny", ("--lora=a b,0.5",), "out/app")
FORM = forms.Form("a cat's day", "", 16, 64, 64, 20, 3.0, "0", "few")
NEEDS = formulas.Needs(16, 10**9, 2**20, 10**8, 2**20, 0)
FEW = few_steps.own(model_names.pipeline("tiny"), "t2v")


def test_few_steps_settle_what_the_fields_say():
  form = FORM._replace(frames=24, steps=None, guidance_scale=7.0)
  c, expected = forms.config(SERVED, form), presets.get_config("tiny")
  few_steps.settle(expected, FEW, ())
  expected.frames = 24
  assert c == expected and c.steps == len(FEW.steps.levels)
  words = shlex.split(forms.command(SERVED, form).replace("\\\n", " "))
  assert words[3:-3] == ["--lora=a b,0.5", "--few", "--frames=24"]
  speeds = estimates.Speeds()
  speeds.measure(NEEDS, 20, {"denoise": 5.0, "decode": 0.5})
  assert speeds.seconds(NEEDS, c.steps) == pytest.approx(1.5)
  assert not guidance.needed(c.guidance_scale)


def test_few_is_refused_for_a_model_that_brings_none(tmp_path):
  assert forms.ways(SERVED) == [
    ("steps", "steps"),
    ("few: 4 evaluations", "few"),
  ]
  other = SERVED._replace(model=str(tmp_path))
  assert [label for label, _ in forms.ways(other)] == ["steps", "few"]
  with pytest.raises(
    errors.UserError, match="brings no few-step LoRA for text"
  ):
    forms.config(other, FORM)
  (tmp_path / "few_t2v").mkdir()
  words = "brings no few-step LoRA for image to video: choose steps$"
  with pytest.raises(errors.UserError, match=words):
    forms.config(other, FORM._replace(image="a.png"))


def test_few_steps_of_a_lora_that_is_given(tmp_path):
  """It is merged for both ways, and no other: the transformer stays."""
  lora = pathlib.Path(shutil.copytree(FEW.lora, tmp_path / "lora"))
  steps = few.FewSteps((1.0, 0.5), "renoise", str(lora))
  few.write(lora, steps)
  served = SERVED._replace(flags=(), loras=(f"{lora},0.5",))
  c = forms.config(served, FORM)
  assert (c.few, c.levels, c.steps) == ("given", (1.0, 0.5), 2)
  assert forms.ways(served)[1] == ("few: 2 evaluations", "few")
  words = shlex.split(forms.command(served, FORM).replace("\\\n", " "))
  assert words[3:5] == [f"--lora={lora},0.5", "--few"]
  models, told = loads.Models("tiny", loras=served.loras), []
  pipeline = models.get("t2v")
  before = weights(pipeline)
  assert models.get("t2v", True, told.append) is pipeline
  assert same(weights(pipeline), before) and not told
  few.write(lora, steps._replace(chunk=2))
  with pytest.raises(errors.UserError, match="with `dcvideogen stream`"):
    forms.config(served, FORM)


def weights(pipeline):
  # Copies: views would keep the arrays.
  return jax.tree.map(np.array, pipeline.parts.transformer.variables)


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize(
  ("options", "line"),
  [
    ({}, "merging the few-step LoRA of tiny into its transformer"),
    (
      {"weights": "int8"},
      "loading the transformer of tiny for t2v, with its few-step LoRA",
    ),
    (
      {"loras": [f"{FEW.lora / 'adapter_model.safetensors'},0.5"]},
      "loading the transformer of tiny for t2v, with its few-step LoRA",
    ),
  ],
  ids=["alone", "int8", "beside another LoRA"],
)
def test_there_is_one_transformer_with_few_steps_or_without(
  monkeypatch, options, line
):
  """Its weights are those that a program has that loads it at once."""
  models, told, gone = loads.Models("tiny", **options), [], []
  pipeline = models.get("t2v")
  before, kept = weights(pipeline), (pipeline.embedder, pipeline.parts.space)
  load = loads.loading.transformer

  def watched(*args, **given):
    gone.append(all(x() is None for x in leaves))
    return load(*args, **given)

  def cancel(text):
    raise runs.Cancelled

  monkeypatch.setattr(loads.loading, "transformer", watched)
  with pytest.raises(runs.Cancelled):
    models.get("t2v", True, cancel)
  assert models.held is pipeline and models.get("t2v") is pipeline
  expected = weights(loads.Models("tiny", **options).get("t2v", True))
  assert not same(before, expected)
  for merged in (True, False):
    variables = pipeline.parts.transformer.variables
    leaves = [weakref.ref(x) for x in jax.tree.leaves(variables)]
    del variables
    assert models.get("t2v", merged, told.append) is pipeline
    assert same(weights(pipeline), expected if merged else before)
  assert told == [line, "loading the transformer of tiny for t2v"]
  assert (pipeline.embedder, pipeline.parts.space) == kept
  assert gone == [True] * (1 if options == {} else 2)
