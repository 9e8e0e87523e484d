"""Sentences for users."""

import pickle

from dcvideogen_jax import errors


def test_long_words_are_shortened():
  name, path = "x" * 5000, "/" + "/".join(["directory"] * 50)
  sentence = str(errors.UserError(f"{path}: no {name}a, found {name}"))
  assert sentence.startswith(f"{path}: no xxx")
  assert "xx...(5002 characters)...xx" in sentence and "xa, found" in sentence
  assert len(sentence) < 1500


def test_a_sentence_passes_between_processes():
  found = pickle.loads(pickle.dumps(errors.UserError("a file is missing")))
  assert type(found) is errors.UserError and str(found) == "a file is missing"
