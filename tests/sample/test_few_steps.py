"""Which few-step LoRA is taken, and for what it was distilled."""

import json

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import few_steps

WHOLE = {"levels": [1.0, 0.5], "solver": "renoise"}
STREAM = WHOLE | {"chunk": 2}


def write(directory, content):
  directory.mkdir(parents=True)
  (directory / "few.json").write_text(json.dumps(content))
  return directory


@pytest.fixture
def model(tmp_path):
  """A model that brings a LoRA for whole clips, and one for streams."""
  write(tmp_path / "few_t2v", WHOLE)
  write(tmp_path / "few_t2v_stream", STREAM)
  return tmp_path


def test_a_model_brings_its_own(model):
  whole, stream = (few_steps.own(model, "t2v", x) for x in (False, True))
  assert (whole.lora, whole.steps.chunk) == (model / "few_t2v", None)
  assert (stream.lora, stream.steps.chunk) == (model / "few_t2v_stream", 2)
  assert "2 evaluations, renoise" in whole.told()
  assert "for each chunk of 2 latent frames, renoise" in stream.told()
  with pytest.raises(errors.UserError, match="LoRA for streams of i2v"):
    few_steps.own(model, "i2v", True)


def test_a_lora_that_is_given(model, tmp_path):
  style = tmp_path / "style.safetensors"
  style.write_bytes(b"")
  assert few_steps.given([style, tmp_path]) is None
  found = few_steps.given([style, model / "few_t2v"])
  assert (found.name, found.lora) == ("given", None)
  assert found.steps.levels == (1.0, 0.5)
  with pytest.raises(errors.UserError, match="takes one few-step LoRA"):
    few_steps.given([model / "few_t2v", model / "few_t2v_stream"])


def test_clips_and_streams_are_not_mixed(model):
  with pytest.raises(errors.UserError, match="use it with `dcvideogen stream"):
    few_steps.given([model / "few_t2v_stream"])
  with pytest.raises(errors.UserError, match="whole clips, not for streams"):
    few_steps.given([model / "few_t2v"], stream=True)


def test_the_chunk_of_a_stream(model):
  choice = few_steps.own(model, "t2v", True)
  assert few_steps.chunk(choice, None) == few_steps.chunk(choice, 2) == 2
  assert few_steps.chunk(None, 4) == 4 and few_steps.chunk(None, None) is None
  preset = few_steps.preset("self-forcing")
  assert few_steps.chunk(preset, 3) == 3
  with pytest.raises(errors.UserError, match="chunks of 2 .*--chunk=4"):
    few_steps.chunk(choice, 4)
