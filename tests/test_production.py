"""A part of the suite as programs run: XLA's own settings, nothing exact asked.

`conftest` makes all other tests exact and quick to compile. Here they run once
more in a process of their own that has neither.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Files or tests, and how many tests they are.
PARTS = {
  "pipelines": (("tests/sample/test_pipeline_golden.py", "-k", "False"), 3),
}


@pytest.mark.parametrize("part", PARTS)
def test_as_programs_run(part, tmp_path):
  chosen, least = PARTS[part]
  found = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
      f"--basetemp={tmp_path / 'inside'}",
      *chosen,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "DCVIDEOGEN_TEST_SETTINGS": "production",
      "XLA_FLAGS": "",  # Not those of the tests around it.
      "PYTEST_ADDOPTS": "",
    },
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
  passed = re.search(r"(\d+) passed", found.stdout)
  assert passed and int(passed[1]) >= least, found.stdout
