"""The measurements by which `ops.conv3d` chooses an implementation."""

import json

from benchmarks import conv3d
from dcvideogen_jax.ops.conv3d import measured


def test_a_row_has_every_form_and_its_rate():
  row = conv3d.measure((1, 2, 4, 3, 5, 6), repeats=2)
  assert row["shape"] == [1, 2, 4, 3, 5, 6]
  assert set(row["ms"]) == set(measured.COMPILE_S)
  assert min(row["ms"].values()) > 0

  row["ms"] = dict.fromkeys(measured.COMPILE_S, 0.5)
  flops = 2 * 27 * 2 * 4 * 3 * 5 * 6
  last = conv3d.table([row]).splitlines()[-1].split(" | ")
  rates = {float(rate.strip("| ")) for rate in last[1:]}
  assert rates == {round(flops / 0.5e6, 1)}


def test_the_text_is_json():
  rows = [{"shape": [1, 2], "ms": {"xla": 3.0}}] * 2
  platforms = {"cpu": rows, "gpu": rows[:1]}
  assert json.loads(conv3d.dumps(platforms)) == {"platforms": platforms}


def test_the_shipped_rows_are_these_shapes():
  rows = measured.table()["cpu"]
  assert [tuple(row["shape"]) for row in rows] == list(conv3d.SHAPES)
