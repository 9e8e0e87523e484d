"""Both sides of the transformer's benchmark on a tiny model."""

import importlib.metadata
import json
import sys

import pytest

from benchmarks import dit
from dcvideogen_jax import errors

TINY = {
  "layers": 2,
  "width": 32,
  "heads": 2,
  "ffn_width": 48,
  "in_channels": 6,
  "out_channels": 4,
  "patch": (1, 2, 1),
  "text_width": 12,
  "frequencies": 16,
}
LATENTS = (3, 4, 5)


@pytest.mark.parity
@pytest.mark.parametrize(
  ("dtype", "least", "most"), [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.1)]
)
def test_both_sides_agree(dtype, least, most):
  report = dit.compare(TINY, LATENTS, dtype=dtype, repeats=2)
  assert report["tokens"] == 3 * 2 * 5
  assert [*report["versions"]] == ["jax", "torch", "diffusers"]
  for side in report["sides"].values():
    assert len(side["step_s"]) == len(side["core_s"]) == 2
    assert min(side["step_s"] + side["core_s"]) > 0
    assert side["first_s"] > 0
    assert side["peak_bytes"] >= side["loaded_bytes"] > 2**24
  assert report["sides"]["jax"]["compile_s"] > 0
  difference = report["difference"]
  assert 0.1 < difference["largest"] < 1e2
  assert least < difference["max_abs"] / difference["largest"] < most
  assert json.loads(json.dumps(report)) == report
  first, *rows = dit.table(report).splitlines()
  assert first.split() == ["jax", "torch", "ratio"]
  assert f"2 layers, 30 tokens, {dtype}, weights" in rows[-2]


def test_table_has_the_ratio_of_medians():
  def side(*seconds):
    return {
      "compile_s": 0.0,
      "step_s": [*seconds],
      "core_s": [2 * x for x in seconds],
      "loaded_bytes": 2**30,
      "peak_bytes": 3 * 2**29,
    }

  report = {
    "sides": {"jax": side(9, 3, 2), "torch": side(5, 4, 1)},
    "fields": {"layers": 7},
    "tokens": 30,
    "dtype": "float32",
    "weight_bytes": 2**29,
    "difference": {"max_abs": 0.5, "largest": 4.0},
  }
  lines = dit.table(report).splitlines()
  rows = {line[:20].strip(): line[20:].split() for line in lines[:-2]}
  assert rows["step, s"] == ["3.00", "4.00", "0.75"]
  assert rows["step, core seconds"] == ["6.00", "8.00", "0.75"]
  assert rows["compile, s"] == ["0.00", "0.00"]
  assert rows["peak memory, GiB"] == ["1.50", "1.50", "1.00"]
  assert lines[-2] == "7 layers, 30 tokens, float32, weights of 0.50 GiB"
  assert lines[-1] == "outputs differ by up to 1.2e-01 of the largest value"


def test_half_precision_halves_the_weights():
  whole, half = (
    dit.compare(TINY, LATENTS, dtype=dtype, sides=())["weight_bytes"]
    for dtype in ("float32", "bfloat16")
  )
  # Norms, modulation and the time embedding stay in float32.
  assert 0.5 < half / whole < 0.7


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"fields": TINY | {"heads": 5}}, "width 32 is no even multiple of 5"),
    (
      {"fields": TINY | {"depth": 3}},
      r"unknown fields of .*: \['depth'\]",
    ),
    ({"fields": TINY | {"image_width": 8}}, "takes images too"),
    ({"latents": (3, 5, 5)}, r"multiples of the patch \(1, 2, 1\), found"),
    ({"latents": (3, 0, 5)}, r"found \(3, 0, 5\)"),
    ({"dtype": "float16"}, "unknown dtype 'float16': expected one of float32"),
  ],
)
def test_what_cannot_be_timed_is_one_sentence(change, words):
  arguments = {"fields": TINY, "latents": LATENTS} | change
  with pytest.raises(errors.UserError, match=words):
    dit.compare(**arguments)


def test_a_missing_package_is_one_sentence(monkeypatch):
  version = importlib.metadata.version

  def without_diffusers(name):
    if name == "diffusers":
      raise importlib.metadata.PackageNotFoundError(name)
    return "1" if name == "torch" else version(name)

  monkeypatch.setattr(importlib.metadata, "version", without_diffusers)
  with pytest.raises(errors.UserError, match="diffusers, which is not inst"):
    dit.compare(TINY, LATENTS)


def test_a_failing_side_is_one_sentence(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(errors.UserError, match="jax side failed: exit code 1"):
    dit.compare(TINY, LATENTS, sides=("jax",))
