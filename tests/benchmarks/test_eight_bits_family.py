"""The table of the tiny family in eight bits, with made-up videos."""

import numpy as np
import pytest

from benchmarks import eight_bits_family
from dcvideogen_jax.sample import pipeline
from dcvideogen_jax.tiny import evaluation


def test_rows_are_compared_with_float32(monkeypatch):
  loaded = []
  exact = np.full((2, 16, 8, 8, 3), 100, np.uint8)

  def load(source, **options):
    loaded.append((options["task"], options.get("weights")))
    return len(loaded)

  def score(model, prompts, batch_size, seed, size, **settings):
    assert (prompts, seed, size) == (4, 0, (16, 64, 64))
    assert settings["steps"] == 16
    shown = exact.copy()
    shown[1, :4] += 2 * (model - 1)  # A quarter of the second video.
    videos = [{"right": i < model} for i in range(4)]
    return evaluation.Scores({"all": model / 4}, 16, {}, videos, shown, {}, {})

  monkeypatch.setattr(pipeline.DCVideoGen, "from_pretrained", load)
  monkeypatch.setattr(evaluation, "score", score)
  rows = {x.name: x for x in eight_bits_family.measure("i2v", 4)}
  assert [*rows] == ["float32", "int8", "float8", "bfloat16"]
  assert loaded == [("i2v", x) for x in (None, "int8", "float8", None)]
  assert [x.agree for x in rows.values()] == [1, 0.75, 0.5, 0.25]
  assert [x.accuracy["all"] for x in rows.values()] == [0.25, 0.5, 0.75, 1]
  assert rows["float32"].psnr.size == 0
  assert rows["int8"].psnr[0] == np.inf
  # Mean square over all frames: 4 / 4 and 16 / 4 levels.
  for name, mse in (("int8", 1), ("float8", 4)):
    expected = 10 * np.log10(255**2 / mse)
    assert rows[name].psnr[1] == pytest.approx(expected)
