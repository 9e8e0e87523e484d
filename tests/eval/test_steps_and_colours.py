"""Fidelity to the first image, drift of colours, flicker at borders."""

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.eval import flicker, image_to_video, images


def video(frames=8, seed=0, size=(12, 14)):
  shape = (frames, *size, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
  ("rgb", "lab"),
  [
    ((255, 0, 0), (53.24, 80.09, 67.20)),
    ((0, 0, 255), (32.30, 79.19, -107.86)),
    ((10, 10, 10), (2.74, 0, 0)),
    ((119, 119, 119), (50.03, 0, 0)),
  ],
)
def test_colours_are_cielab(rgb, lab):
  """Published values of sRGB's colours under D65."""
  frames = np.zeros((1, 4, 5, 3), np.uint8)
  frames[:] = rgb
  black = np.zeros((4, 5, 3), np.uint8)
  found = image_to_video.colour_drift(frames, black)[0]
  np.testing.assert_allclose(found, lab, atol=0.02)
  assert image_to_video.drift(frames, black)[0] == pytest.approx(
    np.linalg.norm(lab), abs=0.02
  )


def test_drift_starts_at_the_first_frame():
  x = video()
  x[4:] //= 2
  found = image_to_video.drift(x)
  assert found[0] == 0 and found[4:].min() > 3 * found[:4].max()


def test_the_first_frame_counts():
  x = video()
  image = x[0].copy()
  image[:6] //= 2
  found = image_to_video.first_frame(
    image, x, lambda a, b: np.array([float((a != b).mean())])
  )
  assert found["psnr"] == images.psnr(image[None], x[:1])[0]
  assert found["ssim"] == images.ssim(image[None], x[:1])[0]
  assert found["lpips"] == (image != x[0]).mean() > 0
  equal = image_to_video.first_frame(x[0], x)
  assert equal == {"psnr": np.inf, "ssim": pytest.approx(1)}


@pytest.mark.parametrize("axis", ["frames", "rows", "columns"])
def test_a_step_at_a_border_is_found(axis):
  """Every second block of 4 is 6 levels brighter than the original."""
  x = np.random.default_rng(1).integers(20, 200, (12, 12, 12, 3), np.uint8)
  place = ["frames", "rows", "columns"].index(axis)
  block = (np.arange(12) // 4 % 2 * 6).astype(np.uint8)
  shape = [1, 1, 1, 1]
  shape[place] = 12
  y = x + block.reshape(shape)
  if axis == "frames":
    found = flicker.chunk_borders(y, 4, x)
    plain = flicker.chunk_borders(x, 4)
    late = flicker.chunk_borders(y, 4, x, offset=1)
  else:
    measure = getattr(flicker, axis[:-1] + "_borders")
    found, plain = measure(y, [0, 4, 8], x), measure(x, [4, 8])
    late = measure(y, [1, 5, 9], x)
  assert found.border == 6 and found.elsewhere == 0 and found.ratio == np.inf
  np.testing.assert_array_equal(found.curve, [0, 0, 0, 6, 0, 0, 0, 6, 0, 0, 0])
  assert late.border == 0 and late.elsewhere == pytest.approx(
    np.sqrt(2 * 36 / 8)
  )
  assert plain.ratio == pytest.approx(1, abs=0.1)
  assert plain.curve[0] == pytest.approx(
    np.sqrt(
      np.mean(np.square(np.diff(x.astype(float), axis=place).take(0, place)))
    )
  )


def test_no_flicker_is_a_ratio_of_one():
  x = video()
  assert flicker.chunk_borders(x, 4, x).ratio == 1


def test_borders_that_are_not_there(wrong_shapes):
  x = video()
  with pytest.raises(errors.UserError, match="between 8 frames, found 0"):
    flicker.chunk_borders(x, 8)
  with pytest.raises(errors.UserError, match="between 8 frames, found 7"):
    flicker.chunk_borders(x, 1)
  with pytest.raises(ValueError, match="equal shapes"):
    flicker.row_borders(x, [4], x[1:])
