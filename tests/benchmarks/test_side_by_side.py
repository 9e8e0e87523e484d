"""Both sides of the benchmark on a tiny autoencoder."""

import json
import sys

import pytest

from benchmarks import reconstruct
from dcvideogen_jax import errors
from tests import golden_data

CLIP = (1, 8, 16, 24)


@pytest.mark.parity
def test_both_sides_agree():
  report = reconstruct.compare(golden_data.SMALL, CLIP, repeats=2)
  for side in report["sides"].values():
    assert len(side["encode_s"]) == len(side["decode_s"]) == 2
    assert min(side["encode_s"] + side["decode_s"]) > 0
    assert side["peak_bytes"] >= side["loaded_bytes"] > 2**24
  assert report["sides"]["jax"]["compile_s"] > 0
  for name in ("latents", "video"):
    difference = report["difference"][name]
    # Plausible activations, which differ by rounding only.
    assert 0.1 < difference["largest"] < 1e3
    assert 0 < difference["max_abs"] < 1e-4 * difference["largest"]
  assert json.loads(json.dumps(report)) == report
  rows = reconstruct.table(report).splitlines()
  assert rows[0].split() == ["jax", "torch", "ratio"]
  encode = next(row for row in rows if "encode" in row).split()[2:]
  sides = report["sides"].values()
  assert encode[:2] == [f"{sum(s['encode_s']) / 2:.2f}" for s in sides]


def test_a_failing_side_is_one_sentence(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(
    errors.UserError, match="the jax side failed: exit code 1"
  ):
    reconstruct.compare(golden_data.SMALL, CLIP, sides=("jax",))


@pytest.mark.parametrize("clip", [(1, 8, 12, 8), (1, 6, 8, 8), (0, 8, 8, 8)])
def test_a_clip_that_would_be_padded_is_refused(clip):
  with pytest.raises(errors.UserError, match="multiple of 8 frames"):
    reconstruct.compare(golden_data.SMALL, clip)
