"""Which encoders are taken."""

import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.precompute import encoders as encoders_lib
from tests.launch import launching

TINY = launching.ROOT / "dcvideogen_jax" / "assets" / "dcvideogen_tiny"


@pytest.mark.parametrize(
  ("task", "wholes", "given", "words"),
  [
    ("t2v", [], {"dc_ae_v": "no"}, "there are no weights at no"),
    ("t2v", [], {"wan_vae": "no"}, "there is no wan_vae at no"),
    ("t2v", ["no"], {}, "there is no model no"),
    ("t2v", [], {"tokenizer": "."}, "there is no autoencoder: give --model"),
    (
      "t2v",
      [],
      {"dc_ae_v": "tiny", "tokenizer": "."},
      "text takes both an encoder and a tokenizer, found . alone",
    ),
    ("i2v", [], {"dc_ae_v": "tiny"}, "image to video takes CLIP"),
  ],
)
def test_missing_encoders(task, wholes, given, words):
  with pytest.raises(errors.UserError, match=words):
    encoders_lib.check(encoders_lib.find(task, wholes, given), task == "i2v")


def test_encoders_of_two_models(tmp_path):
  """What both have comes from the first, and what is named from there."""
  base = tmp_path / "base"
  for part in ("vae", "text_encoder", "transformer", "image_encoder"):
    (base / part).mkdir(parents=True)
  (tmp_path / "clip").mkdir()
  given = {"image_encoder": str(tmp_path / "clip"), "wan_vae": None}
  found = encoders_lib.find("i2v", [str(base), None, "tiny"], given)
  assert found.transformer is None and found.scheduler is None
  assert found.wan_vae == base / "vae"
  assert found.text_encoder == base / "text_encoder"
  assert found.tokenizer == TINY / "tokenizer"
  assert found.dc_ae_v.resolve() == TINY.parent / "dc_ae_v_tiny"
  assert found.image_encoder == tmp_path / "clip"
  assert encoders_lib.find("t2v", ["tiny"], given).image_encoder is None
