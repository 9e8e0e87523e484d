"""Settings of the whole suite: devices, precision, shape checks, memory, order.

Tests run on eight fake CPU devices, with exact products and quick compilation.
Some of them run once more as programs do: `test_production.py`.
"""

import ctypes
import gc
import json
import os
import pathlib

from tests import compiling

os.environ["JAX_PLATFORMS"] = "cpu"
PRODUCTION = os.environ.get("DCVIDEOGEN_TEST_SETTINGS") == "production"
if not PRODUCTION:
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
      compiling.FLAGS,
    ]
  )

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import shapes  # noqa: E402

# Every call in the package has the shapes and dtypes that its signature says.
jaxtyping.install_import_hook("dcvideogen_jax", f"{shapes.__name__}.check")

from dcvideogen_jax.data import probing  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if not PRODUCTION:
  jax.config.update("jax_default_matmul_precision", "highest")

SECONDS = pathlib.Path(__file__).parent / "seconds.json"


def pytest_addoption(parser):
  parser.addoption(
    "--record-seconds",
    action="store_true",
    help=f"write the seconds that each test file took to {SECONDS.name}",
  )
  parser.addoption(
    "--at-most",
    type=float,
    metavar="SECONDS",
    help=f"leave out the files that take longer, by {SECONDS.name}",
  )


def pytest_collection_modifyitems(config, items):
  """Puts the longest files first, so that all workers end together.

  A worker gets one file after the other, as tests of a file share fixtures.
  """
  seconds = json.loads(SECONDS.read_text())
  most = config.getoption("at_most")
  if most is not None:
    long = [x for x in items if seconds.get(_file(x.nodeid), 0) > most]
    config.hook.pytest_deselected(items=long)
    items[:] = [x for x in items if x not in {*long}]
  items.sort(key=lambda item: -seconds.get(_file(item.nodeid), 60))


_taken: dict[str, float] = {}


def pytest_runtest_logreport(report):
  file = _file(report.nodeid)
  _taken[file] = _taken.get(file, 0) + report.duration


def pytest_sessionfinish(session):
  if session.config.getoption("record_seconds") and _taken:
    if not hasattr(session.config, "workerinput"):
      seconds = json.loads(SECONDS.read_text()) | {
        file: round(taken) for file, taken in _taken.items()
      }
      lines = json.dumps(dict(sorted(seconds.items())), indent=0)
      SECONDS.write_text(lines + "\n")


def _file(nodeid):
  return nodeid.split("::")[0].removeprefix("tests/")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_freed():
  """Keeps a worker's memory at what its largest file needs."""
  yield
  jax.clear_caches()
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="session")
def _videos_are_remembered_elsewhere(tmp_path_factory):
  """Not in the cache directory of whoever runs the tests."""
  path = tmp_path_factory.mktemp("probed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probing, "directory", lambda: path)
    yield


@pytest.fixture
def wrong_shapes():
  """For a test that passes wrong shapes to see the package refuse them."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


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
