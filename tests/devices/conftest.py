"""What is compiled for a device is compiled as it would be there."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _default_precision():
  """Kernels have no products of bfloat16 in more than one pass."""
  with jax.default_matmul_precision("default"):
    yield
