"""One server of programs and one small model for all tests."""

import pytest

from tests.launch import launching, precomputing


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
  server = launching.Server(tmp_path_factory.mktemp("programs"))
  yield server
  server.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
  """Directory, module and variables of a chunk-causal model."""
  return launching.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
  """Four clips of two shapes, and all that can be wrong with one."""
  path = tmp_path_factory.mktemp("videos")
  precomputing.write_videos(path)
  return path


@pytest.fixture(scope="session")
def base_vae(tmp_path_factory):
  """Directory, module and variables of a random autoencoder like Wan's."""
  directory = tmp_path_factory.mktemp("base") / "vae"
  return directory, *precomputing.write_base_vae(directory)
