"""The records of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from dcvideogen_jax import errors, report


def _steps(directory):
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def test_progress_line_and_records(tmp_path, capsys):
  with report.Report(tmp_path, total_steps=10) as log:
    log.progress(1, {"loss": 0.123456}, report.Work(8, 10, 1e3))
    log.restart_clock(1)
    log.progress(1, {"loss": 0.5}, report.Work(8, 10, 1e3))
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("step 1/10  loss 0.1235  0.")
  assert "clips/s  " in lines[0] and " TFLOP/s  mfu " in lines[0]
  assert "  ETA 0:00:0" in lines[0]
  assert lines[1] == "step 1/10  loss 0.5"
  first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] == 0.123456
  speed = first["seconds_per_step"] * first["clips_per_second"]
  assert speed == pytest.approx(8)
  assert first["seconds_per_step"] * first["flops_per_second"] == (
    pytest.approx(10)
  )
  assert first["mfu"] == pytest.approx(first["flops_per_second"] / 1e3)


def test_without_a_peak_there_is_no_utilisation():
  metrics, line = report.Work(8, 10).speed(0.5)
  assert metrics["flops_per_second"] == 20 and "mfu" not in metrics
  assert "TFLOP/s" in line and "mfu" not in line


def test_resuming_drops_what_came_after_and_half_a_line(tmp_path):
  with report.Report(tmp_path, 10) as log:
    for step in (1, 2, 3):
      log.record(step, {"loss": 1.0 / step})
  with (tmp_path / "metrics.jsonl").open("a") as out:
    out.write('{"step": 4, "lo')
  with report.Report(tmp_path, 10, first_step=2) as log:
    assert _steps(tmp_path) == [1, 2]
    log.record(3, {"loss": 0.0})
  assert _steps(tmp_path) == [1, 2, 3]


def test_images_are_png(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  with report.Report(tmp_path, 10) as log:
    path = log.image(7, "strip", pixels)
  assert path == tmp_path / "strips" / "strip_0000007.png"
  with Image.open(path) as image:
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("steps", [3, 60])
def test_a_full_disk_is_told_and_nothing_waits(tmp_path, monkeypatch, steps):
  """A thread that wrote the events would end, and be waited for for ever."""

  def fail(*args):
    raise OSError(28, "No space left on device")

  with (
    pytest.raises(errors.UserError, match="cannot write .*No space left"),
    report.Report(tmp_path, 100) as log,
  ):
    log.record(1, {"loss": 1.0})
    monkeypatch.setattr(report.event_file_writer.RecordWriter, "write", fail)
    for step in range(2, steps):
      log.record(step, {"loss": 1.0})
  assert _steps(tmp_path) == [1, 2]


def test_a_parent_that_is_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot create"):
    report.Report(tmp_path / "file" / "run", 10)
