"""Checkpoints survive restarts, damage and other meshes."""

import contextlib
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax import checkpoint, errors, sharding


def _data():
  source = grain.MapDataset.range(100).seed(1).shuffle().repeat()
  return iter(source.to_iter_dataset().batch(2))


def _state(seed, sharding=None):
  rng = np.random.default_rng(seed)
  state = {
    "params": {"w": rng.random((8, 4), np.float32)},
    "opt": (jnp.asarray(rng.random(3), jnp.bfloat16), None),
    "step": np.int32(seed),
  }
  return jax.device_put(state, sharding)


def _target(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def saved(tmp_path):
  """Steps 1 to 3, with the batches that follow each."""
  data, following = _data(), {}
  with checkpoint.Checkpointer(tmp_path, keep=5) as saver:
    for step in (1, 2, 3):
      next(data)
      saver.save(step, _state(step), data, {"note": "x"})
      state = data.get_state()
      following[step] = next(data)
      data.set_state(state)
  return tmp_path, following


def test_restores_state_data_and_meta(saved):
  directory, following = saved
  data = _data()
  with checkpoint.Checkpointer(directory) as saver:
    found = saver.restore(_target(_state(0)), data)
  assert found.step == 3
  assert found.meta == {"step": 3, "note": "x"}
  _assert_same(found.state, _state(3))
  assert found.state["opt"][0].dtype == jnp.bfloat16
  np.testing.assert_array_equal(next(data), following[3])


def test_nothing_saved_yet(tmp_path):
  with checkpoint.Checkpointer(tmp_path / "new") as saver:
    assert saver.restore(_target(_state(0)), _data()) is None


def test_keeps_the_newest(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    for step in (1, 2, 3, 4):
      saver.save(step, _state(step), _data())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_donation_right_after_saving_is_safe(tmp_path):
  """Saving goes on in the background while the next step reuses memory."""
  advance = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0
  )
  with checkpoint.Checkpointer(tmp_path) as saver:
    state = _state(1)
    saver.save(1, state, _data())
    for _ in range(3):
      state = advance(state)
    jax.block_until_ready(state)
    saver.wait()
    found = saver.restore(_target(_state(0)))
  _assert_same(found.state, _state(1))


def test_restores_onto_another_mesh(tmp_path):
  rules = [("params/.*", "fsdp"), (".*", "replicate")]
  one = sharding.make_mesh({"data": 2, "fsdp": 4})
  other = sharding.make_mesh({"data": 4, "fsdp": 2})
  state = _state(1)
  with checkpoint.Checkpointer(tmp_path) as saver:
    where = sharding.shardings(state, one, rules)
    saver.save(1, jax.device_put(state, where), _data())
    where = sharding.shardings(state, other, rules)
    found = saver.restore(_target(jax.device_put(state, where))).state
  w = found["params"]["w"]
  assert {shard.data.shape for shard in w.addressable_shards} == {(4, 4)}
  _assert_same(found, state)


def _truncate(directory: pathlib.Path):
  for path in (directory / "state").rglob("d/*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-8])


def _zero(directory: pathlib.Path):
  for path in (directory / "state").rglob("d/*"):
    if path.is_file():
      path.write_bytes(bytes(path.stat().st_size))


def _lose_arrays(directory: pathlib.Path):
  shutil.rmtree(directory / "state" / "ocdbt.process_0")
  shutil.rmtree(directory / "state" / "d")


def _lose_metadata(directory: pathlib.Path):
  (directory / "state" / "_METADATA").unlink()


def _lose_state(directory: pathlib.Path):
  shutil.rmtree(directory / "state")


def _lose_position(directory: pathlib.Path):
  for path in (directory / "data").glob("process*"):
    path.write_text("{")


DAMAGES = [
  _truncate,
  _zero,
  _lose_arrays,
  _lose_metadata,
  _lose_state,
  _lose_position,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back(saved, damage, caplog):
  directory, following = saved
  damage(directory / "3")
  data = _data()
  with (
    checkpoint.Checkpointer(directory) as saver,
    caplog.at_level(logging.WARNING),
  ):
    found = saver.restore(_target(_state(0)), data)
    assert found.step == 2
    _assert_same(found.state, _state(2))
    np.testing.assert_array_equal(next(data), following[2])
    assert f"{directory / '3'} cannot be read" in caplog.text
    assert (directory / "3.unreadable").is_dir()
    saver.save(3, _state(30), data)
    saver.wait()
    _assert_same(saver.restore(_target(_state(0))).state, _state(30))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Steps 1 and 2 of arrays large enough to be stored as they are."""
  path = tmp_path_factory.mktemp("large")
  with checkpoint.Checkpointer(path) as saver:
    for step in (1, 2):
      saver.save(step, _large(step), _data())
  return path


def _large(step):
  x = jax.random.normal(jax.random.key(step), (128, 128))
  return {"params": {"w": x, "v": x.astype(jnp.bfloat16)}, "step": step + x[0]}


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_never_restored(large, tmp_path, seed, caplog):
  """Whatever the file: the values are right, or those of the step before."""
  shutil.copytree(large, tmp_path, dirs_exist_ok=True)
  rng = np.random.default_rng(seed)
  paths = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
  # Most of the bytes are weights.
  sizes = np.array([p.stat().st_size for p in paths])
  path = paths[rng.choice(len(paths), p=sizes / sizes.sum())]
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)
  with checkpoint.Checkpointer(tmp_path, read_only=True) as saver:
    found = saver.restore(_target(_large(0)))
  _assert_same(found.state, _large(found.step))
  if found.step == 1:
    assert f"{tmp_path / '2'} cannot be read" in caplog.text


def test_damaged_values_are_named(large, tmp_path, caplog):
  """Bits that the format's own checks do not cover."""
  shutil.copytree(large, tmp_path, dirs_exist_ok=True)
  path = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with checkpoint.Checkpointer(tmp_path) as saver:
    assert saver.restore(_target(_large(0))).step == 1
  assert re.search("the values of params/[vw] are not those", caplog.text)
  assert (tmp_path / "2.unreadable").is_dir()


def test_a_flipped_digit_of_the_position_is_noticed(saved, caplog):
  directory, following = saved
  (path,) = (directory / "3" / "data").glob("process*")
  text = path.read_text()
  at = re.search(r"\d", text).start()
  path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
  data = _data()
  with checkpoint.Checkpointer(directory) as saver:
    assert saver.restore(_target(_state(0)), data).step == 2
  np.testing.assert_array_equal(next(data), following[2])
  assert "the position in the data is not the one" in caplog.text


def test_a_checkpoint_of_an_earlier_version_has_no_digests(saved, caplog):
  directory, _ = saved
  path = directory / "3" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  assert meta.pop("digests")["state"].keys() == {"params/w", "opt/0", "step"}
  path.write_text(json.dumps(meta))
  with checkpoint.Checkpointer(directory) as saver:
    found = saver.restore(_target(_state(0)), _data())
  assert found.step == 3 and found.meta == {"step": 3, "note": "x"}
  _assert_same(found.state, _state(3))
  (said,) = [x for x in caplog.messages if "digests" in x]
  assert f"{directory / '3'} is of an earlier version" in said


@contextlib.contextmanager
def _largest_file(size):
  """A limit that acts like a full disk, also on threads in C++."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asks", ["wait", "save", "close"])
def test_a_full_disk_is_one_sentence(tmp_path, asks, caplog):
  """It is met in the background, and told to whoever asks next."""
  with contextlib.ExitStack() as stack:
    saver = stack.enter_context(checkpoint.Checkpointer(tmp_path))
    saver.save(1, _large(1), _data())
    saver.wait()
    with _largest_file(20_000):
      saver.save(2, _large(2), _data())
      with pytest.raises(errors.UserError) as e:
        if asks == "wait":
          saver.wait()
        elif asks == "save":
          saver.save(3, _large(3), _data())
        else:
          stack.pop_all().close()
  said = str(e.value)
  assert said.startswith(f"cannot save to {tmp_path}: File too large; the")
  assert not [x for x in caplog.records if x.levelno >= logging.ERROR]
  with checkpoint.Checkpointer(tmp_path) as saver:
    found = saver.restore(_target(_large(0)))
  assert found.step == 1
  _assert_same(found.state, _large(1))
  # What the failed save has left may still be written to, and so stay a moment.
  for _ in range(50):
    with checkpoint.Checkpointer(tmp_path):
      if [p.name for p in tmp_path.iterdir()] == ["1"]:
        break
    time.sleep(0.1)
  else:
    pytest.fail(f"left {[*tmp_path.iterdir()]}")


PROCESS = """
import sys
import jax
from dcvideogen_jax import checkpoint, errors
index = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, index)
from tests import test_checkpoint as t
mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.P("x"))
make = jax.jit(lambda: {"w": jax.numpy.arange(8.0)}, out_shardings=split)
with checkpoint.Checkpointer(sys.argv[3]) as saver:
  saver.save(1, make(), t._data())
  saver.wait()
  found = saver.restore(t._target(make()), t._data())
  assert (found.state["w"] == make()["w"]).all()
  def fail(directory, step):
    raise errors.UserError("only here")
  if index == 1:
    checkpoint._require_processes = fail
  try:
    saver.restore(t._target(make()), t._data())
  except errors.UserError as e:
    print(e)
"""


def test_processes_that_disagree_raise_together(tmp_path):
  """Where one refuses a checkpoint the other one does not wait for it."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i), tmp_path / "run"],
      cwd=pathlib.Path(__file__).parents[1],
      env={**os.environ, "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    ended = [process.communicate(timeout=100) for process in pair]
  finally:
    for process in pair:
      process.kill()
  for out, err in ended:
    assert out.splitlines()[-1:] == ["only here"], err


def test_reading_changes_nothing(saved):
  """Neither what is damaged nor what another process may be saving."""
  directory, _ = saved
  _lose_arrays(directory / "3")
  shutil.copytree(directory / "2", directory / "4.orbax-checkpoint-tmp")
  before = sorted(directory.rglob("*"))
  with checkpoint.Checkpointer(directory, read_only=True) as saver:
    assert saver.restore(_target(_state(0))).step == 2
  assert sorted(directory.rglob("*")) == before


def test_another_number_of_processes(saved):
  """Told, and again when started again: nothing is renamed or begun anew."""
  directory, _ = saved
  for path in directory.glob("*/data/process_0-of-1.json"):
    shutil.copy(path, path.with_name("process_1-of-2.json"))
    path.rename(path.with_name("process_0-of-2.json"))
  before = sorted(directory.rglob("*"))
  for _ in range(2):
    with (
      checkpoint.Checkpointer(directory) as saver,
      pytest.raises(errors.UserError, match="of 2 processes, found 1"),
    ):
      saver.restore(_target(_state(0)), _data())
    assert sorted(directory.rglob("*")) == before
  with checkpoint.Checkpointer(directory) as saver:
    assert saver.restore(_target(_state(0))).step == 3


def test_all_damaged_is_an_error_not_a_fresh_start(saved):
  directory, _ = saved
  for step in "123":
    _lose_arrays(directory / step)
  for _ in range(2):
    with (
      checkpoint.Checkpointer(directory) as saver,
      pytest.raises(errors.UserError, match="none of the 3 checkpoints"),
    ):
      saver.restore(_target(_state(0)))


def test_another_state_lists_every_difference(saved):
  directory, _ = saved
  state = _state(0)
  state["params"] = {"w": jnp.zeros((8, 5)), "b": jnp.zeros(2)}
  with (
    checkpoint.Checkpointer(directory) as saver,
    pytest.raises(errors.UserError) as e,
  ):
    saver.restore(_target(state))
  assert "missing params/b (2,)" in str(e.value)
  assert "expected (8, 5), found (8, 4)" in str(e.value)
  assert (directory / "3").is_dir()


def test_a_half_written_checkpoint_is_ignored(saved):
  directory, _ = saved
  shutil.copytree(
    directory / "3", directory / "4.orbax-checkpoint-tmp-1", dirs_exist_ok=True
  )
  with checkpoint.Checkpointer(directory) as saver:
    assert saver.restore(_target(_state(0))).step == 3
