"""Rescaled rotary positions are kept in every config.json."""

import json
import logging

import pytest

from dcvideogen_jax import convert
from dcvideogen_jax.models import wan_dit
from tests.convert import checkpoints


def save(directory, layout, scale):
  fields = checkpoints.T2V | {"rope_scale": scale}
  weights = checkpoints.state_dict("wan_dit", fields, "diffusers")
  module, variables = convert.load("wan_dit", weights, fields)
  convert.save(directory, "wan_dit", module, variables, layout=layout)
  return module


@pytest.mark.parametrize("layout", [None, "diffusers", "original"])
@pytest.mark.parametrize("scale", [(1, 1, 1), (1, 2, 2), (1.0, 0.5, 1.25)])
def test_is_read_again(tmp_path, layout, scale):
  module = save(tmp_path, layout, scale)
  assert module.rope_scale == scale
  found, _ = convert.load("wan_dit", tmp_path)
  assert found == module
  written = json.loads((tmp_path / "config.json").read_text())
  # Files of other libraries stay as those write them wherever they can.
  assert ("rope_scale" in written) == (layout is None or scale != (1, 1, 1))


@pytest.mark.parametrize("scale", [[1, 1], [1, 0, 1], [1, 1, "2"], []])
def test_what_is_no_scale(scale):
  config = wan_dit_config() | {"rope_scale": scale}
  with pytest.raises(ValueError, match="rope_scale"):
    wan_dit.build(convert.KINDS["wan_dit"].config_from(config))


def wan_dit_config():
  fields = convert.config_of(wan_dit.build(checkpoints.T2V))
  return convert.KINDS["wan_dit"].configs["diffusers"](fields)


@pytest.mark.parity
def test_diffusers_says_that_it_ignores_it(tmp_path):
  """diffusers opens the model and warns that it ignores rope_scale."""
  import diffusers

  save(tmp_path, "diffusers", (1, 2, 2))
  told = []
  handler = logging.Handler()
  handler.emit = lambda record: told.append(record.getMessage())
  diffusers.utils.logging.set_verbosity_warning()
  diffusers.utils.logging.add_handler(handler)
  try:
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
  finally:
    diffusers.utils.logging.remove_handler(handler)
  assert model.config.num_layers == checkpoints.T2V["layers"]
  assert any("rope_scale" in x and "will be ignored" in x for x in told)
