"""Both sides of every comparison compute the same, on tiny models."""

import importlib.metadata
import json
import sys

import pytest

from benchmarks import inputs, sides
from benchmarks.tasks import (
  autoencoder,
  loading,
  sampling,
  text_encoder,
  training,
  transformer,
)
from dcvideogen_jax import errors
from tests import golden_data
from tests.convert import checkpoints

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
UMT5 = {"width": 32, "heads": 4, "head_width": 8, "ffn_width": 48}


def _plausible(report, calls, count):
  for side in report["sides"].values():
    assert [*side["calls"]] == calls
    for call in side["calls"].values():
      assert len(call["s"]) == len(call["core_s"]) == count
      assert min(call["s"] + call["core_s"]) > 0
    assert side["peak_bytes"][0] >= side["loaded_bytes"][0] > 2**24
    assert side["product_rate"][0] > 1e9
  assert json.loads(json.dumps(report)) == report


def _agree(report, name, least, most):
  difference = report["differences"][name]
  # Plausible numbers, which differ by rounding only.
  assert 0.1 < difference["largest"] < 1e3
  assert least <= difference["max_abs"] / difference["largest"] < most


@pytest.mark.parity
def test_autoencoders_agree():
  request = autoencoder.request(golden_data.SMALL, (1, 8, 16, 24))
  report = sides.compare("autoencoder", request, repeats=2, warm_up=False)
  _plausible(report, ["encode", "decode"], 2)
  assert min(report["flops"][name] for name in ("encode", "decode")) > 1e7
  assert report["sides"]["jax"]["compile_s"][0] > 0
  for name in ("encode", "decode"):
    _agree(report, name, 1e-9, 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
  ("dtype", "least", "most"), [("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.1)]
)
def test_transformers_agree(dtype, least, most):
  request = transformer.request(TINY, LATENTS, dtype)
  assert request["tokens"] == 3 * 2 * 5
  report = sides.compare("transformer", request, repeats=2)
  assert [*report["versions"]] == ["jax", "torch", "diffusers"]
  _plausible(report, ["step"], 2)
  assert report["sides"]["jax"]["compile_s"][0] > 0
  _agree(report, "step", least, most)


@pytest.mark.parity
def test_text_encoders_agree():
  request = text_encoder.request(UMT5, 2, 9)
  report = sides.compare("text_encoder", request)
  _plausible(report, ["encode"], 1)
  _agree(report, "encode", 0, 1e-5)


@pytest.mark.parity
def test_training_steps_agree():
  """The loss after two steps, which the updates of the first have changed."""
  request = training.request({**TINY, "out_channels": 6}, 2, LATENTS, 5)
  report = sides.compare("training", request, repeats=1)
  _plausible(report, ["step"], 1)
  _agree(report, "step", 0, 1e-5)


@pytest.mark.parity
def test_whole_samplings_agree():
  """Levels of pixels from 0 to 255, of which rounding may move a few by 1."""
  report = sides.compare("sampling", sampling.request(steps=4))
  _plausible(report, ["sample"], 1)
  assert report["flops"]["sample"] > 1e8
  assert report["differences"]["sample"]["largest"] > 100
  assert report["differences"]["sample"]["max_abs"] <= 1


@pytest.mark.parity
def test_torch_counts_the_flops_that_jax_counts():
  """The whole sampling has torch's count, the other tasks this code's."""
  request = transformer.request(TINY, LATENTS)
  (step,) = transformer.torch(request).calls.values()
  counted = transformer.jax(request).flops()["step"]
  assert inputs.torch_flops(step) == pytest.approx(counted, rel=0.02)


@pytest.mark.parity
def test_both_sides_load_the_same(tmp_path):
  fields = checkpoints.INFERRED | {"layers": 12}
  size = loading.write(tmp_path, fields, shard_gb=0.001)
  assert 2e6 < size < 1e8
  request = {"directory": str(tmp_path)}
  report = sides.compare("loading", request, warm_up=False)
  _plausible(report, ["load", "read"], 1)
  # The sums of all bits are equal.
  assert report["differences"]["read"]["max_abs"] == 0
  for side in report["sides"].values():
    # A side whose memory grew by less than the files has not read them all.
    assert side["peak_bytes"][0] - side["loaded_bytes"][0] > size


def test_sides_take_turns(monkeypatch):
  order = []

  def run(module, request):
    import numpy as np

    assert module == "benchmarks.worker"
    order.append(request["side"])
    np.savez(request["outputs"], step=np.full(2, len(order), np.float32))
    calls = {"step": {"s": [len(order)], "core_s": [1.0]}}
    sizes = {name: 2**30 for name in ("loaded_bytes", "peak_bytes")}
    flops = {"step": 7} if request["side"] == "jax" else {}
    return {"load_s": 0.0, "compile_s": 0.0, "calls": calls, **sizes} | {
      "flops": flops,
      "product_rate": 1e9 * len(order),
    }

  monkeypatch.setattr(sides.processes, "run", run)
  monkeypatch.setattr(sides, "_version", lambda name: "1")
  report = sides.compare("transformer", {}, rounds=3)
  assert order == ["jax", "torch", "torch", "jax", "jax", "torch"]
  assert report["sides"]["jax"]["calls"]["step"]["s"] == [1, 4, 5]
  assert report["sides"]["torch"]["calls"]["step"]["s"] == [2, 3, 6]
  assert report["differences"]["step"] == {"max_abs": 1.0, "largest": 6.0}
  assert report["flops"] == {"step": 7}
  assert report["sides"]["torch"]["product_rate"] == [2e9, 3e9, 6e9]


def test_table_has_the_ratio_of_medians():
  def side(*seconds, products):
    return {
      "load_s": [1.0],
      "product_rate": [1e9, products],
      "compile_s": [0.0],
      "loaded_bytes": [2**30],
      "peak_bytes": [3 * 2**29, 2**40, 2**20],
      "calls": {"step": {"s": [*seconds], "core_s": [2 * x for x in seconds]}},
    }

  report = {
    "flops": {"step": 6e9},
    "sides": {
      "jax": side(9, 3, 2, products=2e9),
      "torch": side(5, 4, 1, products=5e9),
    },
    "differences": {"step": {"max_abs": 0.5, "largest": 4.0}},
  }
  lines = sides.table(report, [("more", lambda side: len(side["calls"]))])
  first, _, *rows, last = lines.splitlines()
  assert first == "|  | jax | torch | ratio |"
  cells = {row.split(" | ")[0][2:]: row.split(" | ")[1:] for row in rows}
  assert cells["step, s"] == ["3.00", "4.00", "0.75 |"]
  assert cells["step, core s"] == ["6.00", "8.00", "0.75 |"]
  assert cells["compile, s"] == ["0.00", "0.00", " |"]
  assert cells["matrix products, GFLOP/s"] == ["2.00", "5.00", "0.40 |"]
  # 6 GFLOP in 3 and in 4 seconds, of 5 GFLOP/s.
  assert cells["step, share of the peak"] == ["0.40", "0.30", "1.33 |"]
  assert cells["memory peak, GiB"] == ["1.50", "1.50", "1.00 |"]
  assert cells["more"] == ["1.00", "1.00", "1.00 |"]
  assert last == "step: outputs differ by up to 5.00e-01 of values up to 4"


def test_half_precision_halves_the_weights():
  whole, half = (
    transformer.request(TINY, LATENTS, dtype)["weight_bytes"]
    for dtype in transformer.DTYPES
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
    transformer.request(**arguments)


@pytest.mark.parametrize("clip", [(1, 8, 12, 8), (1, 6, 8, 8), (0, 8, 8, 8)])
def test_a_clip_that_would_be_padded_is_refused(clip):
  with pytest.raises(errors.UserError, match="multiple of 8 frames"):
    autoencoder.request(golden_data.SMALL, clip)


def test_a_missing_package_is_one_sentence(monkeypatch):
  version = importlib.metadata.version

  def without_diffusers(name):
    if name == "diffusers":
      raise importlib.metadata.PackageNotFoundError(name)
    return "1" if name == "torch" else version(name)

  monkeypatch.setattr(importlib.metadata, "version", without_diffusers)
  with pytest.raises(errors.UserError, match="diffusers, which is not inst"):
    sides.compare("transformer", {})


@pytest.mark.parametrize("task", ["autoencoder", "transformer", "loading"])
def test_a_failing_side_is_one_sentence(monkeypatch, task):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(errors.UserError, match="jax side failed: exit code 1"):
    sides.compare(task, {}, sides=("jax",))
