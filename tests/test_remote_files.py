"""Files, records and checkpoints where nothing grows and nothing is renamed."""

import json
import pathlib
import time
import types

import jax
import numpy as np
import pytest

from dcvideogen_jax import checkpoint, errors, files, report
from tests import object_store, test_checkpoint

bucket = object_store.bucket


def test_a_file_appears_as_a_whole_or_not_at_all(bucket):
  with files.atomic("gs://bucket/run/a.json") as temporary:
    temporary.write_text("first")
    assert temporary.suffix == ".json" and not bucket
  assert files.path(pathlib.Path("gs://bucket/a")) == files.path(
    "gs://bucket/a"
  )
  with (
    pytest.raises(RuntimeError, match="stop"),
    files.atomic("gs://bucket/run/a.json") as temporary,
  ):
    temporary.write_text("half")
    raise RuntimeError("stop")
  assert bucket == {"bucket/run/a.json": b"first"}


def test_a_directory_is_part_of_names(bucket, tmp_path):
  directory = files.make_directory("gs://bucket/run/deep")
  assert str(directory) == "gs://bucket/run/deep" and not bucket
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "c.txt").write_text("x")
  files.upload(tmp_path, directory)
  assert bucket == {"bucket/run/deep/a/b/c.txt": b"x"}


@pytest.mark.parametrize(
  ("problem", "sentence"),
  [
    (ImportError("Please install gcsfs"), "gs:// needs gcsfs, which"),
    (OSError("Forbidden: run\nlong"), "cannot use gs://bucket/run: Forbidden"),
    (KeyError(), "cannot use gs://bucket/run: KeyError"),
  ],
)
def test_what_cannot_be_used_is_told(bucket, monkeypatch, problem, sentence):
  def fail(*args, **kwargs):
    raise problem

  monkeypatch.setattr(object_store.FileSystem, "ls", fail)
  with pytest.raises(errors.UserError, match=sentence) as e:
    files.make_directory("gs://bucket/run")
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("use", [files.path, files.make_directory])
def test_other_schemes_are_refused(use):
  with pytest.raises(errors.UserError, match="gs://, found s3://x/y"):
    use("s3://x/y")


def _steps(bucket):
  lines = bucket["bucket/run/metrics.jsonl"].decode().splitlines()
  return [json.loads(line)["step"] for line in lines]


def test_records_are_written_when_due(bucket, monkeypatch):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0], time=time.time)
  monkeypatch.setattr(report, "time", clock)
  with report.Report("gs://bucket/run", 10) as log:
    log.record(1, {"loss": 1.0})
    assert not bucket
    log.flush()
    assert _steps(bucket) == [1]
    log.record(2, {"loss": 1.0})
    now[0] = 61
    log.record(3, {"loss": 1.0})
    assert _steps(bucket) == [1, 2, 3]
    log.record(4, {"loss": 1.0})
  assert _steps(bucket) == [1, 2, 3, 4]
  with report.Report("gs://bucket/run", 10, first_step=2) as log:
    log.record(3, {"loss": 0.0})
  assert _steps(bucket) == [1, 2, 3]
  events = [x for x in bucket if x.startswith("bucket/run/tensorboard/events.")]
  assert events and all(b"loss" in bucket[name] for name in events)


def test_pictures(bucket):
  pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  with report.Report("gs://bucket/run", 10) as log:
    path = log.image(7, "strip", pixels)
  assert str(path) == "gs://bucket/run/strips/strip_0000007.png"
  assert bucket["bucket/run/strips/strip_0000007.png"].startswith(b"\x89PNG")


@pytest.fixture
def saved(bucket):
  """Steps 1 and 2."""
  data = test_checkpoint._data()
  with checkpoint.Checkpointer("gs://bucket/run", keep=2) as saver:
    for step in (0, 1, 2):
      saver.save(step, test_checkpoint._state(step), data)
  return bucket


def _restored():
  with checkpoint.Checkpointer("gs://bucket/run") as saver:
    target = test_checkpoint._target(test_checkpoint._state(0))
    found = saver.restore(target, test_checkpoint._data())
  test_checkpoint._assert_same(found.state, test_checkpoint._state(found.step))
  return found.step


def test_a_checkpoint_counts_once_it_is_committed(saved):
  assert "bucket/run/2/state/manifest.ocdbt" in saved
  assert not any(name.startswith("bucket/run/0/") for name in saved)
  assert not any("tmp" in name for name in saved)
  assert _restored() == 2
  del saved["bucket/run/2/commit_success.txt"]
  assert _restored() == 1


def test_a_damaged_checkpoint_is_set_aside(saved):
  for name in list(saved):
    if name.startswith("bucket/run/2/state/") and "/d/" in name:
      saved[name] = bytes(len(saved[name]))
  assert _restored() == 1
  assert "bucket/run/2.unreadable/state/manifest.ocdbt" in saved
  assert not any(name.startswith("bucket/run/2/") for name in saved)


def test_restores_onto_another_mesh(saved):
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  where = jax.sharding.NamedSharding(mesh, jax.P("x"))
  target = test_checkpoint._target(test_checkpoint._state(0))
  w = target["params"]["w"]
  target["params"]["w"] = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=where)
  with checkpoint.Checkpointer("gs://bucket/run") as saver:
    found = saver.restore(target).state
  assert found["params"]["w"].sharding == where
  test_checkpoint._assert_same(found, test_checkpoint._state(2))
