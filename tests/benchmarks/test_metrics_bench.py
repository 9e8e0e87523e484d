"""The sides measure the same clips, where the other packages are there."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import metrics, metrics_worker
from dcvideogen_jax import errors
from dcvideogen_jax.eval import images

OTHERS = all(
  importlib.util.find_spec(name)
  for name in ("torch", "torchmetrics", "lpips", "torchvision")
)
SHAPE = (2, 3, 40, 36)


def test_values_and_measurements():
  sides = metrics.SIDES if OTHERS else metrics.SIDES[:1]
  report = metrics.compare(SHAPE, sides, threads=1)
  assert json.loads(json.dumps(report)) == report
  for side in report["sides"].values():
    assert len(side["seconds"]) == 2 and min(side["seconds"]) > 0
    assert side["first_s"] > 0 and side["cpu_s"] > 0
    assert 2**27 < side["peak_bytes"] < 2**33
    assert (
      len(side["values"]["lpips"]) == 2 and min(side["values"]["lpips"]) > 0
    )
  psnr = [
    np.mean(images.psnr(*metrics_worker.clips(i, [*SHAPE[1:]]))) for i in (1, 2)
  ]
  assert report["sides"]["jax"]["values"]["psnr"] == pytest.approx(psnr)
  rows = metrics.table(report).splitlines()
  assert rows[1].startswith("a clip, s ")
  assert rows[-1].startswith("2 clips of 3x40x36, PSNR, SSIM and LPIPS")


def test_sides_that_differ_are_refused():
  values = {"psnr": [30.0, 31.0], "ssim": [0.9, 0.9], "lpips": [0.1, 0.1]}
  other = values | {"lpips": [0.1, 0.1002]}
  metrics._check({"jax": {"values": values}, "torch": {"values": values}})
  with pytest.raises(errors.UserError, match="different lpips"):
    metrics._check({"jax": {"values": values}, "torch": {"values": other}})
