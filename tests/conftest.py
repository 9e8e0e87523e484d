"""Tests run on eight fake CPU devices, strictly; see the settings below.

A part of them runs once more as programs do: `test_production.py`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
PRODUCTION = os.environ.get("DCVIDEOGEN_TEST_SETTINGS") == "production"
if not PRODUCTION:
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
      # Tests compile hundreds of programs and run each once or twice.
      "--xla_backend_optimization_level=0",
    ]
  )

import jax  # noqa: E402
import pytest  # noqa: E402

from dcvideogen_jax.data import probing  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if not PRODUCTION:
  jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def _videos_are_remembered_elsewhere(tmp_path_factory):
  """Not in the cache directory of whoever runs the tests."""
  path = tmp_path_factory.mktemp("probed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probing, "directory", lambda: path)
    yield


@pytest.fixture
def compiled_programs(monkeypatch):
  """Programs that were lowered and compiled ahead of time, each once."""
  programs = []
  compile_ = jax.stages.Lowered.compile

  def compile_and_note(self, *args, **options):
    program = compile_(self, *args, **options)
    executable = program.runtime_executable()
    if all(x.runtime_executable() is not executable for x in programs):
      programs.append(program)
    return program

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_note)
  return programs
