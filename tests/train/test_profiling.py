"""Traces of chosen steps."""

import os
import signal

import pytest

from dcvideogen_jax import errors, report
from dcvideogen_jax.train import loop, profiling


@pytest.mark.parametrize(
  ("text", "steps"),
  [("10-12", range(10, 13)), ("1", range(1, 2)), (" 20-20 ", range(20, 21))],
)
def test_steps(text, steps):
  assert profiling.parse(text, 20) == steps


@pytest.mark.parametrize("text", ["", "0-2", "3-2", "19-21", "x", "1-2-3"])
def test_steps_that_are_none(text):
  with pytest.raises(errors.UserError, match=r"within 1-20, .* found"):
    profiling.parse(text, 20)


@pytest.fixture
def config(config):
  config["val"]["every"] = 0
  return config


def _traces(directory):
  return list(directory.rglob("*.xplane.pb"))


def test_a_trace_of_chosen_steps(config, tmp_path, capsys):
  assert loop.fit(config, tmp_path, profile=range(2, 4))
  (trace,) = _traces(tmp_path / "profile")
  assert b"train" in trace.read_bytes()
  lines = capsys.readouterr().out.splitlines()
  assert lines.index("profiled up to step 3") < next(
    i for i, line in enumerate(lines) if line.startswith("step 3/")
  )


def test_a_continued_run_traces_what_is_left(config, tmp_path):
  assert loop.fit(config | {"steps": 2}, tmp_path, profile=range(3, 4))
  assert not (tmp_path / "profile").exists()
  assert loop.fit(config | {"steps": 4}, tmp_path, profile=range(1, 4))
  assert _traces(tmp_path / "profile")


def test_a_run_that_stops_early_keeps_its_trace(config, tmp_path, monkeypatch):
  progress = report.Report.progress

  def stop(self, step, *args):
    progress(self, step, *args)
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(report.Report, "progress", stop)
  assert not loop.fit(config, tmp_path, profile=range(2, 7))
  assert _traces(tmp_path / "profile")
