"""Starts of programs are timed, and imports divided among packages."""

import pytest

from benchmarks import start
from dcvideogen_jax import errors


def test_starts_and_packages(monkeypatch):
  monkeypatch.setattr(start, "samples", lambda: [{"start": "first"}])
  starts = {
    "python": ("-c", "pass"),
    "work": ("-c", "for i in range(5 * 10**6): pass"),
  }
  report = start.measure(2, starts, "xml.dom.minidom")
  idle, busy = report["starts"]
  assert 0 < idle["cpu s"] < busy["cpu s"] <= 2 * busy["wall s"]
  assert "xml" in {row["package"] for row in report["packages"]}
  first = start.table(report).splitlines()[0]
  assert first == "| start | cpu s | wall s |"


def test_the_second_start_of_a_program_finds_the_cache():
  """Each start has its folder; the phases come from the program's report."""
  code = """
import json, pathlib, sys
options = dict(x[2:].split("=", 1) for x in sys.argv[1:])
cache = pathlib.Path(options["compile_cache"])
known = cache.exists()
cache.mkdir(exist_ok=True)
output = pathlib.Path(options["output"])
output.mkdir()
(output / "x.json").write_text(json.dumps({"seconds": {"compile": 1 - known}}))
"""
  first, second = start.samples(("-c", code))
  assert first["start"] == "sample, first" and first["compile s"] == 1
  assert second["start"] == "sample, second" and second["compile s"] == 0
  assert first["cpu s"] > 0


def test_a_program_that_fails_is_one_sentence():
  with pytest.raises(errors.UserError, match="broken failed: exit code 5"):
    start.measure(1, {"broken": ("-c", "raise SystemExit(5)")})


def test_help_imports_neither_jax_nor_etils():
  """Both take longer to import than everything else that --help needs."""
  code = """
import sys
from dcvideogen_jax.programs import cli
sys.argv = ["dcvideogen", "sample", "--help"]
try:
  cli.main()
finally:
  assert not {"jax", "etils", "av", "grain"} & {*sys.modules}
"""
  start._run("help", ("-c", code))
