"""Names and configurations of the Wan 2.1 autoencoder, both ways."""

import functools
import json

import jax
import numpy as np
import pytest

from dcvideogen_jax import convert, errors
from dcvideogen_jax.convert import wan_vae as tables
from dcvideogen_jax.models import wan_vae
from tests import golden_data

NAME = "wan_vae_tiny"
FIELDS = {"base_width": 6}


@functools.cache
def state_dict(layout):
  """Returns weights named as in diffusers 0.42.1 or in `Wan2.1_VAE.pth`.

  The names of `Wan2.1_VAE.pth` are those of Wan 2.1 commit 9737cba.
  """
  weights = golden_data.weights("wan_vae", NAME)
  if layout == "diffusers":
    return weights
  path = golden_data.GOLDEN / "wan_vae" / f"{NAME}.json"
  names = json.loads(path.read_text())["official_to_diffusers_keys"]
  assert sorted(names.values()) == sorted(weights)
  return {name: weights[theirs] for name, theirs in names.items()}


def load(layout):
  return convert.load("wan_vae", state_dict(layout), FIELDS)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_both_layouts_load_alike_and_come_back_bit_exact(layout):
  module, variables = load(layout)
  jax.tree.map(np.testing.assert_array_equal, variables, load("diffusers")[1])
  found = convert.to_torch("wan_vae", module, variables, layout=layout)
  assert found.keys() == state_dict(layout).keys()
  for name, x in state_dict(layout).items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def config():
  module = wan_vae.build(FIELDS)
  return tables.config_to(convert.config_of(module))


def test_configuration_comes_back():
  fields = tables.config_from(json.loads(json.dumps(config())))
  assert wan_vae.build(fields) == wan_vae.build(FIELDS)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"is_residual": True}, "is_residual is True"),
    ({"patch_size": 2}, "patch_size is 2"),
    ({"decoder_base_dim": 8}, "decoder_base_dim is 8"),
    ({"attn_scales": [0.5]}, "attn_scales is"),
  ],
)
def test_other_autoencoders_of_wan_are_refused(changes, message):
  with pytest.raises(errors.UserError, match=message):
    tables.config_from(config() | changes)


def test_incomplete_configuration_is_refused():
  incomplete = {k: v for k, v in config().items() if k != "z_dim"}
  with pytest.raises(errors.UserError, match="lacks z_dim"):
    tables.config_from(incomplete)


def test_configuration_of_another_class_is_not_ours():
  assert tables.config_from(config() | {"_class_name": "AutoencoderKL"}) is None
