"""The pipeline's promises for image to video: conditions, sizes, refusals."""

import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.sample import conditioning, sizes
from tests import random_weights
from tests.sample.small import PHOTO, make, run


@pytest.fixture(scope="module")
def i2v():
  return make("i2v")


def test_image_to_video(i2v):
  result = run(i2v, image=PHOTO)
  assert result.video().shape == (1, 10, 10, 18, 3)
  other = run(i2v, image=PHOTO[::-1])
  assert np.abs(result.latents - other.latents).max() > 1e-3
  both = run(i2v, image=PHOTO, last_image=PHOTO[::-1])
  assert np.abs(result.latents - both.latents).max() > 1e-3


def test_condition_holds_the_images_and_grey(i2v):
  size = sizes.Size(12, 8, 16)
  found = i2v.condition(PHOTO, PHOTO[::-1], size)
  mask, encoded = np.split(found["extra"], [4], axis=-1)
  np.testing.assert_array_equal(mask[0, :, 0, 0, 0], [1, 0, 1])
  space = i2v.parts.space
  photos = [
    conditions.resize(x, 8, 16) / np.float32(127.5) - 1
    for x in (PHOTO, PHOTO[::-1])
  ]
  grey = np.zeros((4, 8, 16, 3), np.float32)
  video = np.concatenate(
    [np.repeat(photos[0][None], 4, 0), grey, np.repeat(photos[1][None], 4, 0)]
  )
  # The last chunk is filled with its last frame.
  video = np.concatenate([video, np.repeat(video[-1:], 4, 0)])[None]
  encode = random_weights.jitted(space.module, "encode")
  expected = encode(space.variables, video)
  np.testing.assert_allclose(encoded, 0.9 * expected[:, :3], atol=2e-5)


@pytest.mark.parametrize("last", [False, True])
def test_a_condition_that_fills_no_chunk(i2v, last):
  """The last frame is repeated or, as in the reference, the tail is alone.

  The reference encodes the tail without the chunk before it, amid zeros.
  """
  space = i2v.parts.space
  size = i2v.size(12, 8, 12)  # A chunk has 8 frames.
  images = (PHOTO[:8, :12], PHOTO[8:16, :12] if last else None)
  video = np.zeros((1, 12, 8, 12, 3), np.float32)
  video[:, :4] = images[0] / np.float32(127.5) - 1
  if last:
    video[:, -4:] = images[1] / np.float32(127.5) - 1
  module, variables = space.module, space.variables
  encode = random_weights.jitted(module, "encode")
  tail = random_weights.jitted(module.unchunked(), "encode")
  filled = np.concatenate([video, video[:, -1:].repeat(4, 1)], axis=1)
  expected = {
    "pad": encode(variables, filled),
    "official": np.concatenate(
      [encode(variables, video[:, :8]), tail(variables, video[:, 8:])], axis=1
    ),
  }
  found = {
    tail: i2v.condition(*images, size, tail=tail)["extra"][..., 4:]
    for tail in ("pad", "official")
  }
  for tail, x in found.items():
    scaled = expected[tail][:, :3] * module.latent_scale
    np.testing.assert_allclose(x, scaled, atol=2e-5, rtol=0)
  assert np.abs(found["pad"] - found["official"])[:, 2].max() > 0.01


@pytest.mark.parametrize(
  ("options", "tail"),
  [
    ({}, "pad"),
    ({"size_rule": "official"}, "official"),
    ({"size_rule": "official", "condition_tail": "pad"}, "pad"),
    ({"condition_tail": "official"}, "official"),
  ],
)
def test_the_official_sizes_imply_the_official_condition(
  i2v, monkeypatch, options, tail
):
  asked = []

  def condition(*args):
    asked.append(args[-1])
    raise errors.UserError("seen")

  monkeypatch.setattr(i2v, "condition", condition)
  with pytest.raises(errors.UserError, match="seen"):
    run(i2v, image=PHOTO, frames=12, **options)
  assert asked == [tail]


def test_images_have_the_size_of_their_video_unless_told(i2v):
  size = i2v.size(8, None, None, image=PHOTO)
  assert size.width / size.height == pytest.approx(50 / 30, rel=0.01)
  assert size.height * size.width == pytest.approx(720 * 1280, rel=0.01)
  official = i2v.size(8, None, None, image=PHOTO, rule="official")
  assert official.height % 4 == 0 and official.width % 4 == 0
  small = i2v.size(8, None, None, 900, PHOTO)
  assert small.height * small.width == pytest.approx(900, rel=0.1)


def test_two_images_where_the_model_tells_them_apart():
  made = make("i2v", image_positions=10)
  size = sizes.Size(8, 8, 8)
  both = made.condition(PHOTO, PHOTO[::-1], size)["image"]
  assert both.shape == (1, 10, 16)
  assert np.abs(both[:, :5] - both[:, 5:]).max() > 1e-3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"image": np.zeros((0, 5, 3), np.uint8)}, "image must be uint8"),
    (
      {"image": PHOTO, "height": None, "width": None, "area": 0},
      "area must be",
    ),
    (
      {
        "condition": {
          "image": np.full((1, 5, 16), np.nan, np.float32),
          "extra": np.zeros((1, 3, 3, 5, 8), np.float32),
        }
      },
      '"image" must be finite',
    ),
    ({}, "give an image"),
    ({"image": PHOTO[..., :1]}, "image must be uint8"),
    ({"image": PHOTO, "last_image": PHOTO / 255}, "last_image must be uint8"),
    ({"image": PHOTO, "last_image": PHOTO, "frames": 4}, "more than 4 frames"),
    ({"condition": {"extra": np.zeros((1, 3, 3, 5, 8))}}, "a condition of"),
    (
      {"condition": {"image": PHOTO, "extra": np.zeros((1, 3, 3, 4, 8))}},
      "a condition of",
    ),
  ],
)
def test_refusals_of_images(i2v, changes, message):
  with pytest.raises(errors.UserError, match=message):
    run(i2v, **changes)


def test_images_of_the_same_bytes_and_other_shapes_differ(i2v, monkeypatch):
  monkeypatch.setattr(i2v, "condition", lambda x, *_: {"image": x.shape})
  found = conditioning.Conditions()
  for image in (PHOTO, PHOTO.reshape(50, 30, 3), PHOTO):
    images = conditioning.Images(image, None, sizes.Size(8, 8, 8))
    assert found(i2v, images, None) == {"image": image.shape}


def test_a_condition_is_computed_once(i2v):
  size = i2v.size(10, 10, 18)
  condition = i2v.condition(PHOTO, None, size)
  np.testing.assert_array_equal(
    run(i2v, condition=condition).latents, run(i2v, image=PHOTO).latents
  )


def test_pillow_and_numpy_are_welcome(i2v):
  image = PIL.Image.fromarray(PHOTO)
  found = run(i2v, image=image, seed=np.int64(0), height=np.int64(10))
  np.testing.assert_array_equal(found.latents, run(i2v, image=PHOTO).latents)
