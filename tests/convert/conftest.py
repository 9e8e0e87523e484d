"""One tiny transformer for all tests of low-rank updates."""

import pytest

from dcvideogen_jax import convert
from tests.convert import lora_files


@pytest.fixture(scope="session")
def base():
  """Returns the transformer's module and variables."""
  return convert.load("wan_dit", lora_files.weights(), lora_files.FIELDS)
