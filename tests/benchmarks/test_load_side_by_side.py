"""Both sides load the same tiny checkpoint; the measurements are plausible."""

import json
import sys

import pytest

from benchmarks import load
from dcvideogen_jax import convert, errors
from tests.convert import checkpoints


@pytest.fixture
def tiny(monkeypatch):
  kind = convert.KINDS["wan_dit"]
  variants = kind.variants | {"tiny": checkpoints.INFERRED | {"layers": 12}}
  monkeypatch.setitem(
    convert.KINDS, "wan_dit", kind._replace(variants=variants)
  )
  return "tiny"


@pytest.mark.parity
def test_both_sides_hold_the_same(tiny):
  report = load.compare(tiny, shard_gb=0.001)
  assert 2e6 < report["file_bytes"] < 1e8
  for side in report["sides"].values():
    assert side["load_s"][0] > 0 and side["read_s"][0] > 0
    # A side whose memory grew by less than the files has not read them all.
    assert side["grown_bytes"][0] > report["file_bytes"]
  assert json.loads(json.dumps(report)) == report
  rows = load.table(report).splitlines()
  assert rows[0].split() == ["jax", "torch", "ratio"]
  assert rows[-1].startswith("tiny, 0.0")


def test_a_side_that_fails_is_one_sentence(tiny, monkeypatch):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(errors.UserError, match="jax side failed: exit code 1"):
    load.compare(tiny, sides=("jax",))


def test_an_unknown_variant_is_named():
  with pytest.raises(errors.UserError, match="unknown variant 'x': expected"):
    load.compare("x")
