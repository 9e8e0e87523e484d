"""Compiled programs survive the process; others are not mistaken for them."""

import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import dcvideogen_jax
from dcvideogen_jax.sample import programs

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(3, 5)), jnp.float32)
W = jnp.asarray(RANDOM.normal(size=(5, 5)), jnp.float32)


class Function:
  """A jitted function that counts how often it is traced."""

  def __init__(self, **options):
    self.traced = 0
    self.jitted = jax.jit(self._call, **options)

  def _call(self, x, w):
    self.traced += 1
    return {"y": jnp.tanh(x @ w["w"]), "x": x + 1}


def run(directory, function, name="f", x=X, w=W):
  """The program, what it gives, and whether it came from the directory."""
  made = programs.Programs(directory)
  args = (jnp.array(x), {"w": w})
  program = made.get(name, function.jitted, *args)
  assert made.get(name, function.jitted, *args) is program
  return program, jax.tree.map(np.asarray, program(*args)), made.loaded


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for name, x in other.items():
    np.testing.assert_array_equal(one[name], x)


def test_the_second_time_it_is_loaded(tmp_path):
  function = Function()
  _, expected, loaded = run(tmp_path / "p", function)
  assert (loaded, function.traced) == (0, 1)
  np.testing.assert_allclose(expected["y"], np.tanh(X @ W), atol=1e-6)
  _, found, loaded = run(tmp_path / "p", function)
  assert (loaded, function.traced) == (1, 1)
  assert_equal(found, expected)
  (file,) = (tmp_path / "p").iterdir()
  assert file.suffix == ".jaxexec" and file.stat().st_mode & 0o777 == 0o600


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  function = Function()
  for _ in range(2):
    assert run(None, function)[2] == 0
  assert not list(tmp_path.iterdir())


_SCRIPT = """
import jax, numpy as np
from tests.sample import test_programs as t
jax.config.update("jax_default_matmul_precision", "highest")
function = t.Function()
_, found, loaded = t.run({directory!r}, function)
assert (loaded, function.traced) == (1, 0), (loaded, function.traced)
np.savez({output!r}, **found)
"""


def test_another_process_loads_it(tmp_path):
  _, expected, _ = run(tmp_path / "p", Function())
  script = _SCRIPT.format(
    directory=str(tmp_path / "p"), output=str(tmp_path / "found.npz")
  )
  root = pathlib.Path(dcvideogen_jax.__file__).parents[1]
  subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
  assert_equal(dict(np.load(tmp_path / "found.npz")), expected)


def test_what_jax_has_cached_is_kept_whole(tmp_path, monkeypatch):
  """An executable out of jax's own cache cannot be serialized on a CPU."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    function = Function()
    expected = jax.tree.map(np.asarray, function.jitted(X, {"w": W}))
    cached = list((tmp_path / "jax").iterdir())
    assert cached
    run(tmp_path / "p", Function())
    _, found, loaded = run(tmp_path / "p", function)
    assert loaded == 1
    assert_equal(found, expected)
    # jax's cache works as before for everything else.
    jax.jit(lambda x: x * 3 - 1)(X)
    assert len(list((tmp_path / "jax").iterdir())) > len(cached)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _flag(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " ")


def _version(monkeypatch):
  monkeypatch.setattr(dcvideogen_jax, "__version__", "0.0.0")


def _jax_version(monkeypatch):
  monkeypatch.setattr(jax, "__version__", "0.0.0")


def _machine(monkeypatch):
  monkeypatch.setattr(programs, "_machine", lambda: ("another",))


def _source(monkeypatch):
  monkeypatch.setattr(programs, "_sources", lambda: "another")


@pytest.mark.parametrize(
  "change", [_flag, _version, _jax_version, _machine, _source]
)
def test_in_other_surroundings_it_is_compiled(tmp_path, monkeypatch, change):
  function = Function()
  run(tmp_path, function)
  change(monkeypatch)
  assert run(tmp_path, function)[2] == 0
  assert len(list(tmp_path.iterdir())) == 2


def test_other_precision_is_another_program(tmp_path):
  function = Function()
  run(tmp_path, function)
  with jax.default_matmul_precision("default"):
    assert run(tmp_path, function)[2] == 0


@pytest.mark.parametrize(
  "changes",
  [
    {"name": "g"},
    {"x": X[:2]},
    {"x": X.astype(jnp.bfloat16)},
    {"w": W.astype(jnp.int32)},
    {"x": jax.device_put(X, jax.devices()[1]), "w": np.asarray(W)},
  ],
)
def test_other_arguments_are_another_program(tmp_path, changes):
  function = Function()
  run(tmp_path, function)
  assert run(tmp_path, function, **changes)[2] == 0
  assert run(tmp_path, function, **changes)[2] == 1


def test_two_names_in_one_object(tmp_path):
  made = programs.Programs(tmp_path)
  plus, times = jax.jit(lambda x: x + 2), jax.jit(lambda x: x * 2)
  assert np.all(made.get("plus", plus, X)(X) == X + 2)
  assert np.all(made.get("times", times, X)(X) == X * 2)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"no pickle",
    pickle.dumps(([0], b"no program", None, None)),
    pickle.dumps(([99], b"", None, None)),
  ],
)
def test_a_damaged_file_is_replaced(tmp_path, data):
  function = Function()
  _, expected, _ = run(tmp_path, function)
  (file,) = tmp_path.iterdir()
  whole = file.stat().st_size
  file.write_bytes(data)
  _, found, loaded = run(tmp_path, function)
  assert loaded == 0 and file.stat().st_size > whole / 2
  assert_equal(found, expected)
  assert run(tmp_path, function)[2] == 1


def test_a_truncated_file_is_replaced(tmp_path):
  function = Function()
  run(tmp_path, function)
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:-500])
  assert run(tmp_path, function)[2] == 0
  assert run(tmp_path, function)[2] == 1


def test_a_flipped_bit_is_noticed(tmp_path, caplog):
  """In machine code or a constant nothing else would notice it."""
  function = Function()
  _, expected, _ = run(tmp_path, function)
  (file,) = tmp_path.iterdir()
  whole = file.read_bytes()
  for at in np.random.default_rng(0).integers(0, len(whole), 8):
    flipped = bytearray(whole)
    flipped[at] ^= 4
    file.write_bytes(flipped)
    _, found, loaded = run(tmp_path, function)
    assert loaded == 0
    assert f"{file} is damaged" in caplog.text
    assert_equal(found, expected)


class Trap:
  """Leaves a trace when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_can_write_is_not_read(tmp_path, mode):
  function = Function()
  run(tmp_path / "p", function)
  (file,) = (tmp_path / "p").iterdir()
  file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
  file.chmod(mode)
  assert run(tmp_path / "p", function)[2] == 0
  assert not (tmp_path / "sprung").exists()
  assert file.stat().st_mode & 0o777 == 0o600
  assert run(tmp_path / "p", function)[2] == 1


def test_of_another_user_it_is_not_read(tmp_path, monkeypatch):
  function = Function()
  run(tmp_path, function)
  user = os.getuid()
  monkeypatch.setattr(os, "getuid", lambda: user + 1)
  assert run(tmp_path, function)[2] == 0


def test_donation_is_kept(tmp_path):
  function = Function(donate_argnums=0)
  for _ in range(2):
    program, _, loaded = run(tmp_path, function)
    x = jnp.array(X)
    program(x, {"w": W})
    assert x.is_deleted()
  assert loaded == 1


def test_over_several_devices_in_their_order(tmp_path):
  def cut(devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("m",))
    spec = jax.sharding.PartitionSpec("m")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.device_put(np.asarray(W)[:4], sharding), mesh

  function = jax.jit(lambda x: x.cumsum(0))
  devices = jax.devices()
  for order in ((5, 2), (2, 5), (3, 0)):
    for loaded in (0, 1):
      x, mesh = cut([devices[i] for i in order])
      made = programs.Programs(tmp_path)
      with jax.set_mesh(mesh):
        found = made.get("sum", function, x)(x)
      assert made.loaded == loaded
      assert {d.id for d in found.sharding.device_set} == set(order)
      np.testing.assert_allclose(found, np.cumsum(W[:4], 0), atol=1e-6)


def test_what_cannot_be_serialized_is_not_kept(tmp_path):
  shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
  function = jax.jit(lambda x: jax.pure_callback(np.negative, shape, x))
  for _ in range(2):
    made = programs.Programs(tmp_path)
    np.testing.assert_array_equal(made.get("call", function, X)(X), -X)
    assert made.loaded == 0
  assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").touch()
  for _ in range(2):
    assert run(tmp_path / "file" / "p", Function())[2] == 0
