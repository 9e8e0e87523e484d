"""The loop: what it writes, exact resume, and what stops it."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from dcvideogen_jax import checkpoint, errors, report
from dcvideogen_jax.train import loop, step


def _saved(config, workdir):
  """Every leaf of the newest checkpoint."""
  run = step.plan(config)
  with checkpoint.Checkpointer(workdir / "checkpoints") as saver:
    found = saver.restore(run.state)
  return found.step, jax.tree.map(np.asarray, found.state)


def _assert_same(one, other):
  assert one[0] == other[0]
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def _records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _without_time(records):
  slow = ("seconds_per_step", "clips_per_second")
  return [{k: v for k, v in r.items() if k not in slow} for r in records]


def _interrupt_at(monkeypatch, at):
  """SIGTERM, as from outside, when the progress of step `at` is printed."""
  progress = report.Report.progress

  def interrupted(self, step, *args):
    progress(self, step, *args)
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(report.Report, "progress", interrupted)


def test_a_run_learns_and_leaves_its_records(config, tmp_path, capsys):
  config["steps"], config["optim"]["lr"] = 40, 3e-2
  config["log_every"], config["val"]["every"] = 10, 20
  assert loop.fit(config, tmp_path)
  records = _records(tmp_path)
  training = [r for r in records if "loss" in r]
  assert [r["step"] for r in training] == [10, 20, 30, 40]
  assert training[-1]["loss"] < 0.7 * training[0]["loss"]
  assert training[-1]["seconds_per_step"] > 0
  measured = [r for r in records if "val/psnr" in r]
  assert [r["step"] for r in measured] == [20, 40]
  assert measured[-1]["val/ema_psnr"] != measured[-1]["val/psnr"]
  strips = sorted(p.name for p in (tmp_path / "strips").iterdir())
  assert strips == [f"reconstruction_{n:07d}.png" for n in (20, 40)]
  with Image.open(tmp_path / "strips" / strips[0]) as image:
    assert image.size == (2 * 8 + 2, 6 * 8 + 5 * 2)
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
  assert any((tmp_path / "tensorboard").iterdir())
  line = capsys.readouterr().out.splitlines()[-2]
  for part in ("step 40/40  loss 0.", "s/step", "clips/s", "ETA 0:00:00"):
    assert part in line


def test_interrupted_and_continued_equals_uninterrupted(
  config, tmp_path, monkeypatch
):
  assert loop.fit(config, tmp_path / "whole")
  with monkeypatch.context() as m:
    _interrupt_at(m, at=3)
    assert not loop.fit(config, tmp_path / "parts")
  assert _saved(config, tmp_path / "parts")[0] == 3
  assert loop.fit(config, tmp_path / "parts")
  _assert_same(
    _saved(config, tmp_path / "whole"), _saved(config, tmp_path / "parts")
  )
  assert _without_time(_records(tmp_path / "whole")) == _without_time(
    _records(tmp_path / "parts")
  )


def test_the_state_depends_on_every_step(config, tmp_path):
  """What bit-equality is worth: another seed or step count differs."""
  assert loop.fit(config, tmp_path / "a")
  config["seed"] = 4
  assert loop.fit(config, tmp_path / "b")
  with pytest.raises(AssertionError):
    _assert_same(_saved(config, tmp_path / "a"), _saved(config, tmp_path / "b"))


def test_a_finished_run_is_left_alone(config, tmp_path, capsys):
  assert loop.fit(config, tmp_path)
  before = _saved(config, tmp_path)
  assert loop.fit(config, tmp_path)
  assert "reached already" in capsys.readouterr().out
  _assert_same(before, _saved(config, tmp_path))


def test_changed_keys_are_told_on_resume(config, tmp_path, capsys):
  assert loop.fit(config, tmp_path)
  config["steps"], config["optim"]["lr"] = 7, 2e-2
  assert loop.fit(config, tmp_path)
  out = capsys.readouterr().out
  assert "resuming after step 6" in out
  assert "steps" in out and "optim.lr" in out


def test_another_model_does_not_resume(config, tmp_path):
  assert loop.fit(config, tmp_path)
  config["ema"] = 0
  with pytest.raises(errors.UserError, match="unexpected ema/mix/kernel"):
    loop.fit(config, tmp_path)


def test_a_metric_that_is_not_finite_stops_the_run(config, tmp_path):
  config["model"]["blow"] = 1000.0
  with pytest.raises(errors.UserError, match="blow became inf at step 1"):
    loop.fit(config, tmp_path)
  assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"task": "fly"}, "task must be one of"),
    ({"batch_size": 12}, "batch_size must be a positive multiple of the 8"),
    ({"mesh": {"data": 3}}, "the mesh"),
    ({"sharding": (("params/.*", "fsdp"),)}, "no rule covers"),
    ({"data": {"source": "nowhere"}}, "data"),
  ],
)
def test_a_config_that_does_not_fit(config, tmp_path, change, message):
  with pytest.raises(errors.UserError, match=message):
    loop.fit(config | change, tmp_path)


def test_sigterm_is_given_back(config, tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  config["steps"], config["optim"]["warmup"] = 1, 0
  assert loop.fit(config, tmp_path)
  assert signal.getsignal(signal.SIGTERM) is before
