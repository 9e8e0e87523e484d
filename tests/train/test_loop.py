"""The loop: what it writes, exact resume, and what stops it."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from dcvideogen_jax import checkpoint, errors, flops, report
from dcvideogen_jax.train import export, loop, step, validation


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
  slow = ("seconds_per_step", "clips_per_second", "flops_per_second")
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


@pytest.mark.parametrize("peak", [None, 1e9])
def test_the_log_has_the_work_of_the_model_over_that_of_devices(
  config, tmp_path, monkeypatch, peak
):
  if peak:
    monkeypatch.setattr(flops, "PEAKS", {"cpu": {"float32": peak}})
  assert loop.fit(config, tmp_path)
  found = [r for r in _records(tmp_path) if "flops_per_second" in r][-1]
  # 8 clips of 2 frames of 8 rows, each times a 24 x 24 matrix, and the gradient
  # of the matrix, which is as much; a multiply-add is two.
  work = found["flops_per_second"] * found["seconds_per_step"]
  assert work == pytest.approx(8 * 2 * 8 * 24 * 24 * 2 * 2)
  assert ("mfu" in found) == bool(peak)
  if peak:
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / (8 * peak))


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


class _Evaluator:
  """Keeps what it is asked to measure."""

  def __init__(self, every, value=2.0):
    self.every, self.value, self.calls = every, value, []

  def __call__(self, variables, step):
    assert not jax.sharding.get_abstract_mesh().empty
    self.calls.append((step, jax.tree.map(np.asarray, variables)))
    return {"score": self.value * step}, {"sheet": np.zeros((2, 3, 3), "u1")}


@pytest.mark.parametrize("ema", [True, False])
def test_evaluators_see_the_average_and_frozen_leaves(config, tmp_path, ema):
  if not ema:
    config["ema"] = None
  evaluator = _Evaluator(every=4)
  assert loop.fit(config, tmp_path, [evaluator])
  assert [step for step, _ in evaluator.calls] == [4, 6]
  _, state = _saved(config, tmp_path)
  _, variables = evaluator.calls[-1]
  expected = state.ema if ema else state.params
  np.testing.assert_array_equal(
    variables["mix"]["kernel"], expected["mix"]["kernel"]
  )
  assert variables["mix"]["gain"] == np.float32(0.9)
  scores = {r["step"]: r["score"] for r in _records(tmp_path) if "score" in r}
  assert scores == {4: 8.0, 6: 12.0}
  sheets = sorted(p.name for p in (tmp_path / "strips").glob("sheet*"))
  assert sheets == ["sheet_0000004.png", "sheet_0000006.png"]


def test_an_evaluator_without_an_answer_stops_the_run(config, tmp_path):
  with pytest.raises(errors.UserError, match="score became nan at step 4"):
    loop.fit(config, tmp_path, [_Evaluator(every=4, value=np.nan)])


def test_validation_counts_what_is_not_nan(config, tmp_path):
  """The task measures "bright" for bright clips only, as numpy does here."""
  config["val"]["batches"] = 3
  assert loop.fit(config, tmp_path)
  run = step.plan(config)
  state = _saved(config, tmp_path)[1]
  data = loop.batches(run, config["val"]["data"], 8, seed=0)
  video = np.concatenate([next(data)["video"] for _ in range(3)])
  data.close()
  video = video.astype(np.float32) / 127.5 - 1
  rows = video.reshape(*video.shape[:3], -1)
  output = 0.9 * (rows @ state.ema["mix"]["kernel"]).reshape(video.shape)
  error = np.square(output - video).mean((1, 2, 3, 4))
  bright = video.mean((1, 2, 3, 4)) > 0
  assert 0 < bright.sum() < len(bright)
  found = [r for r in _records(tmp_path) if "val/psnr" in r][-1]
  assert found["val/ema_psnr"] == pytest.approx(-error.mean(), rel=1e-5)
  assert found["val/ema_bright"] == pytest.approx(
    error[bright].mean(), rel=1e-5
  )


def test_a_validation_that_becomes_nan_is_named(config):
  run = step.plan(config)
  state, frozen = step.init(run)
  data = loop.batches(run, config["val"]["data"], 8, seed=0)
  with jax.set_mesh(run.mesh):
    held_out = validation.Validation(run, [next(data)])
    assert "val/ema_bright" in held_out.measure(state, frozen)
    broken = jax.tree.map(lambda x: x * np.nan, state.params)
    with pytest.raises(errors.UserError, match="val/bright became nan"):
      held_out.measure(state.replace(params=broken), frozen)
  data.close()


def test_a_task_that_shows_nothing_leaves_no_strips(
  config, tmp_path, monkeypatch
):
  linear = step.TASKS["linear"]

  def blind(config):
    task = linear(config)
    return task._replace(predict_fns={"measure": task.predict_fns["measure"]})

  monkeypatch.setattr(step, "TASKS", {"linear": blind})
  assert loop.fit(config, tmp_path)
  assert not (tmp_path / "strips").exists()
  assert any("val/psnr" in r for r in _records(tmp_path))


def test_history_tells_which_samples_led_to_the_parameters(
  config, tmp_path, monkeypatch
):
  config["history"] = True
  assert loop.fit(config, tmp_path / "whole")
  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpointer, "save", _fail_at(4))
    with pytest.raises(OSError, match="disk"):
      loop.fit(config, tmp_path / "parts")
  with (tmp_path / "parts/history.jsonl").open("a") as out:
    out.write('{"step": 5, "sam')
  assert loop.fit(config, tmp_path / "parts")
  histories = [
    (tmp_path / name / "history.jsonl").read_text()
    for name in ("whole", "parts")
  ]
  assert histories[0] == histories[1]
  lines = [json.loads(line) for line in histories[0].splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  samples = [sample for line in lines for sample in line["samples"]]
  assert len(set(samples)) == len(samples) == 6 * 8


def _fail_at(step):
  """A `Checkpointer.save` that finds the disk broken at some step."""
  save = checkpoint.Checkpointer.save

  def failing(self, at, *args):
    if at == step:
      raise OSError("the disk is gone")
    save(self, at, *args)

  return failing


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


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b""])
def test_a_damaged_config_is_told_and_written_anew(
  config, tmp_path, capsys, content
):
  loop.fit(config, tmp_path)
  path = tmp_path / "config.json"
  whole = path.read_bytes()
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match="config.json cannot be read"):
    export.load(tmp_path)
  capsys.readouterr()
  loop.fit(config, tmp_path)
  assert f"{path} was damaged and is written anew" in capsys.readouterr().out
  assert path.read_bytes() == whole


def test_another_model_does_not_resume(config, tmp_path):
  assert loop.fit(config, tmp_path)
  config["ema"] = None
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


def test_sigterm_saves_before_it_measures(config, tmp_path, monkeypatch):
  """Measuring may take longer than is left; nothing is lost but time."""
  _interrupt_at(monkeypatch, 2)
  config["log_every"] = 1
  seen = []

  def measure(variables, step):
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    seen.append((step, str(step) in names))
    return {"seen": 1.0}, {}

  measure.every = 1
  assert not loop.fit(config, tmp_path, evaluators=[measure])
  assert seen == [(1, False), (2, True)]
  assert [r["step"] for r in _records(tmp_path) if "seen" in r] == [1, 2]


def test_sigterm_is_given_back(config, tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  config["steps"], config["optim"]["warmup"] = 1, 0
  assert loop.fit(config, tmp_path)
  assert signal.getsignal(signal.SIGTERM) is before
