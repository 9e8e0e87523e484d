"""Trainings whose directory is in an object store."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from dcvideogen_jax import checkpoint, files, report
from dcvideogen_jax.train import loop, step
from tests import object_store

bucket = object_store.bucket


def _state(config, workdir):
  run = step.plan(config)
  directory = files.path(workdir) / "checkpoints"
  with checkpoint.Checkpointer(directory, read_only=True) as saver:
    found = saver.restore(run.state)
  return found.step, jax.tree.map(np.asarray, found.state)


def _assert_same(one, other):
  assert one[0] == other[0]
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def _lines(text):
  slow = ("seconds_per_step", "clips_per_second", "flops_per_second")
  records = [json.loads(line) for line in text.splitlines()]
  return [{k: v for k, v in r.items() if k not in slow} for r in records]


def _records(bucket, run):
  names = (f"bucket/{run}/metrics.jsonl", f"bucket/{run}/history.jsonl")
  return [_lines(bucket[name].decode()) for name in names]


@pytest.fixture
def whole(config, tmp_path):
  """A run on this machine, which nothing disturbs; its state and records."""
  config["history"] = True
  assert loop.fit(config, tmp_path)
  names = ("metrics.jsonl", "history.jsonl")
  records = [_lines((tmp_path / name).read_text()) for name in names]
  return _state(config, tmp_path), records


def _stop_at(monkeypatch, at, act):
  progress = report.Report.progress

  def interrupted(self, step, *args):
    progress(self, step, *args)
    if step == at:
      act()

  monkeypatch.setattr(report.Report, "progress", interrupted)


def test_told_to_stop_and_continued(config, whole, bucket, monkeypatch):
  with monkeypatch.context() as m:
    _stop_at(m, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not loop.fit(config, "gs://bucket/run", profile=range(2, 9))
  assert "bucket/run/checkpoints/3/commit_success.txt" in bucket
  assert loop.fit(config, "gs://bucket/run")
  _assert_same(_state(config, "gs://bucket/run"), whole[0])
  assert _records(bucket, "run") == whole[1]
  assert json.loads(bucket["bucket/run/config.json"])["seed"] == 3
  for name in ("strips/reconstruction_0000006.png", "tensorboard/events."):
    assert any(x.startswith(f"bucket/run/{name}") for x in bucket), name
  assert any(x.endswith(".xplane.pb") for x in bucket)


class _Killed(BaseException):
  pass


def test_killed_in_a_save_and_continued(config, whole, bucket, monkeypatch):
  """A kill leaves what the store had at that moment, and no marker."""
  left = {}

  def kill():
    left.update(bucket)
    raise _Killed

  with monkeypatch.context() as m, pytest.raises(_Killed):
    _stop_at(m, 5, kill)
    loop.fit(config, "gs://bucket/run")
  bucket.clear()
  bucket.update(left)
  bucket.pop("bucket/run/checkpoints/4/commit_success.txt", None)
  assert "bucket/run/checkpoints/2/commit_success.txt" in bucket
  assert loop.fit(config, "gs://bucket/run")
  _assert_same(_state(config, "gs://bucket/run"), whole[0])
  assert _records(bucket, "run") == whole[1]
