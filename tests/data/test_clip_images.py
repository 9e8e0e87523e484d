"""Images for CLIP equal those of transformers 5.23 and Wan 2.1 (9737cba)."""

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import clip_images

SIZES = [(300, 517), (517, 300), (224, 224), (90, 401), (225, 224), (1, 30)]


def image(height, width):
  rng = np.random.default_rng(height)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def levels(pixels):
  """Converts normalised pixels back to levels from 0 to 255."""
  return (pixels * clip_images.STD + clip_images.MEAN) * 255


def ramp(height, width):
  """An image whose red is the column and whose green is the row."""
  x = np.zeros((height, width, 3), np.uint8)
  x[..., 0] = np.arange(width)[None]
  x[..., 1] = np.arange(height)[:, None]
  return x


def test_centre_is_cut_out_unless_stretched():
  x = ramp(100, 200)
  cut = levels(clip_images.preprocess(x, 50))
  assert cut.shape == (50, 50, 3)
  # Half the size: columns 50 to 150 of 200, all rows.
  np.testing.assert_allclose(cut[20, 1:-1, 0], np.arange(52.5, 147, 2), atol=1)
  np.testing.assert_allclose(cut[1:-1, 20, 1], np.arange(2.5, 97, 2), atol=1)
  whole = levels(clip_images.preprocess(x, 50, stretch=True))
  np.testing.assert_allclose(
    whole[20, 1:-1, 0], np.arange(5.5, 194, 4), atol=0.01
  )
  np.testing.assert_allclose(
    whole[1:-1, 20, 1], np.arange(2.5, 97, 2), atol=0.01
  )


def test_image_of_the_size_is_only_normalised():
  x = image(224, 224)
  for stretch in (False, True):
    found = clip_images.preprocess(x, stretch=stretch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(levels(found), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "x",
  [
    np.zeros((8, 8), np.uint8),
    np.zeros((8, 8, 4), np.uint8),
    np.zeros((8, 8, 3), np.float32),
    np.zeros((0, 8, 3), np.uint8),
  ],
)
def test_other_arrays_are_refused(wrong_shapes, x):
  with pytest.raises(errors.UserError, match="image"):
    clip_images.preprocess(x)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_installed_transformers(size):
  from transformers.models.clip import image_processing_pil_clip

  x = image(*size)
  expected = image_processing_pil_clip.CLIPImageProcessorPil()(
    x, return_tensors="np", input_data_format="channels_last"
  )["pixel_values"][0]
  found = clip_images.preprocess(x)
  np.testing.assert_array_equal(found, np.moveaxis(expected, 0, -1))


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_stretched_equals_torch(size):
  import torch

  x = image(*size)
  tensor = torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1
  resized = torch.nn.functional.interpolate(
    tensor, (224, 224), mode="bicubic", align_corners=False
  )
  expected = (resized[0] * 0.5 + 0.5).permute(1, 2, 0).numpy()
  expected = (expected - clip_images.MEAN) / clip_images.STD
  found = clip_images.preprocess(x, stretch=True)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
