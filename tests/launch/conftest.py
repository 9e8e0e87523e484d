"""One server of programs and one small model for all tests."""

import pytest

from tests.launch import launching


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
  server = launching.Server(tmp_path_factory.mktemp("programs"))
  yield server
  server.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
  """Directory, module and variables of a chunk-causal model."""
  return launching.save_model(tmp_path_factory.mktemp("model"))
