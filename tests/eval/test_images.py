"""PSNR, SSIM and MS-SSIM equal those of the official evaluation's libraries."""

import json
import pathlib

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.eval import images

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "images.json").read_text()
)


def frames(size, noise, seed, n=2):
  """Follows the recipe in `golden/images.json`; RandomState is stable."""
  random = np.random.RandomState(seed)
  h, w = size
  coarse = random.randint(0, 256, (n, -(-h // 4), -(-w // 4), 3))
  x = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :h, :w]
  y = np.clip(x + random.randint(-noise, noise + 1, x.shape), 0, 255)
  return x.astype(np.uint8), y.astype(np.uint8)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["name"])
def test_values_are_those_of_the_libraries(case):
  x, y = frames(case["size"], case["noise"], case["seed"])
  np.testing.assert_allclose(images.psnr(x, y), case["psnr"], atol=1e-5)
  np.testing.assert_allclose(images.ssim(x, y), case["ssim"], atol=2e-5)


@pytest.mark.parametrize(
  "case", GOLDEN["ms_ssim"]["cases"], ids=lambda c: c["name"]
)
def test_ms_ssim_is_that_of_the_library(case):
  x, y = frames(case["size"], case["noise"], case["seed"])
  np.testing.assert_allclose(images.ms_ssim(x, y), case["ms_ssim"], atol=2e-5)


def test_ms_ssim_of_equal_opposite_and_small_frames():
  x, _ = frames((176, 176), 0, 5, n=1)
  assert 1 - 1e-5 < images.ms_ssim(x, x)[0] <= 1
  # Negative similarities count as 0.
  assert images.ms_ssim(x, 255 - x)[0] == 0
  with pytest.raises(errors.UserError, match="176 pixels .* found 175x176"):
    images.ms_ssim(x[:, 1:], x[:, 1:])


def test_equal_frames():
  x, y = frames((12, 20), 9, 0)
  y[0] = x[0]
  psnr = images.psnr(x, y)
  assert psnr[0] == np.inf and np.isfinite(psnr[1])
  ssim = images.ssim(x, y)
  assert 1 - 1e-5 < ssim[0] <= 1 and ssim[1] < 0.999


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_frames_smaller_than_the_window(size):
  """By hand, in float64: frames are mirrored as often as the window needs."""
  x, y = frames(size, 40, 3)
  offsets = np.arange(-5, 6)
  window = np.exp(-(offsets**2) / (2 * 1.5**2))

  def blurred(values):
    for axis, n in ((1, size[0]), (2, size[1])):
      turn = max(1, 2 * n - 2)
      seen = (np.arange(n)[:, None] + offsets) % turn
      seen = np.where(seen < n, seen, turn - seen)
      values = np.moveaxis(values, axis, -1)[..., seen] @ window / window.sum()
      values = np.moveaxis(values, -1, axis)
    return values

  x64, y64 = x.astype(np.float64), y.astype(np.float64)
  a, b = blurred(x64), blurred(y64)
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  likeness = (2 * a * b + c1) / (a**2 + b**2 + c1)
  likeness *= 2 * (blurred(x64 * y64) - a * b) + c2
  likeness /= blurred(x64**2) - a**2 + blurred(y64**2) - b**2 + c2
  # In a single pixel the variance is the rounding of squares in float32.
  np.testing.assert_allclose(
    images.ssim(x, y),
    likeness.mean((1, 2, 3)),
    rtol=0,
    atol=3e-4 if size == (1, 1) else 2e-5,
  )


@pytest.mark.parametrize("metric", [images.psnr, images.ssim, images.ms_ssim])
def test_wrong_arguments(wrong_shapes, metric):
  x, y = frames((8, 8), 5, 1)
  with pytest.raises(TypeError, match="uint8, not float32"):
    metric(x, y.astype(np.float32))
  with pytest.raises(ValueError, match=r"\(2, 8, 8, 3\) and \(1, 8, 8, 3\)"):
    metric(x, y[:1])
