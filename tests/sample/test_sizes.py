"""Sizes of videos, and how the official pipelines round them."""

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.sample import sizes

DEEP = {"spatial": 32, "temporal": 4, "first": 0}
WAN = {"spatial": 16, "temporal": 4, "first": 3}


@pytest.mark.parametrize(
  ("rule", "asked", "expected"),
  [
    (DEEP, (81, 720, 1280), (80, 704, 1280)),
    (DEEP, (80, 704, 1280), (80, 704, 1280)),
    (DEEP, (3, 32, 63), (1, 32, 32)),
    (WAN, (81, 720, 1280), (81, 720, 1280)),
    (WAN, (80, 480, 839), (77, 480, 832)),
    (WAN, (1, 16, 16), (1, 16, 16)),
    (WAN, (4, 17, 31), (1, 16, 16)),
  ],
)
def test_official(rule, asked, expected):
  assert sizes.official(sizes.Size(*asked), **rule) == expected


@pytest.mark.parametrize("side", [(31, 64), (64, 31)])
def test_official_leaves_something(side):
  with pytest.raises(errors.UserError, match="leaves nothing"):
    sizes.official(sizes.Size(8, *side), **DEEP)


@pytest.mark.parametrize(
  ("image", "expected"),
  [
    ((720, 1280), (704, 1280)),
    ((1280, 720), (1280, 704)),
    ((100, 100), (960, 960)),
    ((333, 500), (768, 1152)),
    ((1, 100000), (32, 303552)),
  ],
)
def test_size_of_an_image(image, expected):
  """The sides of the nearest size of the area, rounded down to 32."""
  assert sizes.of_image(*image, multiple=32) == expected


@pytest.mark.parametrize("image", [(720, 1280), (1000, 400), (37, 91)])
def test_size_of_an_image_keeps_area_and_shape(image):
  height, width = sizes.of_image(*image)
  assert height * width == pytest.approx(sizes.AREA, rel=0.003)
  assert height / width == pytest.approx(image[0] / image[1], rel=0.003)


@pytest.mark.parametrize("name", sizes.Size._fields)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None])
def test_refused(name, value):
  size = {"frames": 8, "height": 8, "width": 8, name: value}
  with pytest.raises(errors.UserError, match=f"{name} must be at least 1"):
    sizes.checked(**size)


def test_whole_numbers_of_any_kind():
  found = sizes.checked(np.int64(1), np.uint8(2), 3)
  assert found == (1, 2, 3)
  assert all(type(n) is int for n in found)
