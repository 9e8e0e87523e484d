"""Tests run on eight fake CPU devices, strictly; see the settings below."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Tests compile hundreds of programs and run each once or twice.
    "--xla_backend_optimization_level=0",
  ]
)

import jax
import pytest

from dcvideogen_jax.data import probing

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _videos_are_remembered_elsewhere(tmp_path_factory):
  """Not in the cache directory of whoever runs the tests."""
  path = tmp_path_factory.mktemp("probed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probing, "directory", lambda: path)
    yield
