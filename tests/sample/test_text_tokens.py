"""A model that was trained on shorter texts is sampled with as many tokens."""

import json
import shutil
import warnings

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import layouts, loading, pipeline
from tests.sample import published


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
  directory = tmp_path_factory.mktemp("published") / "wan"
  published.write(directory, "diffusers", "wan_t2v")
  return directory


@pytest.fixture
def model(wan, tmp_path):
  """Returns a model's directory that a test may change."""
  return shutil.copytree(wan, tmp_path / "model")


def say(model, **table):
  (model / "parts.json").write_text(json.dumps(table))


def sample(model):
  made = pipeline.DCVideoGen(loading.load(model, load_model=published.load))
  result = made.generate(
    "a red ball rolls",
    negative_prompt="blurred",
    steps=1,
    height=16,
    width=16,
    frames=1,
  )
  return made, result


def test_a_text_that_is_cut_is_told(model):
  """Wan's own negative prompt causes no warning: it often is too long."""
  say(model, text_tokens=3)
  made = pipeline.DCVideoGen(loading.load(model, load_model=published.load))
  _, mask = made.parts.texts.tokenizer(["a red ball rolls away"])
  tokens = mask.sum()
  words = f"'a red ball rolls away' has {tokens} tokens, .* first 3 are read"
  with pytest.warns(UserWarning, match=words):
    made.embed(["a red ball rolls away"])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    made.embed(["a"])
    made.embed([made.negative_prompt()])


def test_texts_have_as_many_tokens_as_the_directory_says(model):
  found, texts = {}, {}
  for tokens in (None, 512, 24):
    if tokens is not None:
      say(model, text_tokens=tokens)
    made, result = sample(model)
    expected = tokens or 512
    assert made.parts.texts.length == expected
    assert result.settings["text_tokens"] == expected
    texts[tokens] = np.asarray(made.embed(["a red ball rolls"]))
    assert texts[tokens].shape[1] == expected
    found[tokens] = np.asarray(result.latents)
  np.testing.assert_array_equal(found[None], found[512])
  np.testing.assert_allclose(texts[24], texts[512][:, :24], rtol=0, atol=1e-5)
  # The transformer attends to all tokens, also those after the text's end.
  change = np.abs(found[24] - found[512]).max() / found[512].std()
  assert 0.01 < change < 0.1
  assert "text_tokens" not in made.parts.files


def test_beside_parts_that_are_elsewhere(model):
  (model / "vae").rename(model / "mine")
  say(model, text_tokens=7, wan_vae="mine")
  found = layouts.locate(model, "t2v")
  assert found.text_tokens == 7 and found.wan_vae == model / "mine"
  given = layouts.locate(model, "t2v", autoencoder=model / "mine")
  assert given.text_tokens == 7


@pytest.mark.parametrize("tokens", [0, -1, "32", 1.5, True, None])
def test_what_is_no_number_of_tokens(model, tokens):
  say(model, text_tokens=tokens)
  with pytest.raises(errors.UserError, match="text_tokens must be a whole"):
    layouts.locate(model, "t2v")


def test_of_a_repository_too(model, tmp_path, monkeypatch):
  """The file is fetched with the parts."""
  import huggingface_hub

  say(model, text_tokens=9)
  names = [
    path.relative_to(model).as_posix()
    for path in model.rglob("*")
    if path.is_file()
  ]

  def fetch(name, *, revision, allow_patterns):
    del name, revision
    for file in allow_patterns:
      target = tmp_path / "snapshot" / file
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(model / file, target)
    return str(tmp_path / "snapshot")

  monkeypatch.setattr(
    huggingface_hub, "list_repo_files", lambda name, revision: names
  )
  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  monkeypatch.chdir(tmp_path)
  assert layouts.locate("owner/tiny", "t2v").text_tokens == 9
