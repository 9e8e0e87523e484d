"""Checkpoints survive restarts, damage and other meshes."""

import logging
import pathlib
import shutil

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
