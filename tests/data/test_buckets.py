"""Aspect buckets: the tables, the choice of a bucket, resizing to it."""

import re

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets


def _tables():
  return [
    (factor, name, sizes)
    for factor, table in buckets.BUCKETS.items()
    for name, sizes in table.items()
  ]


@pytest.mark.parametrize(("factor", "name", "sizes"), _tables())
def test_tables_hold_whole_latents_from_wide_to_tall(factor, name, sizes):
  ratios = [size.height / size.width for size in sizes]
  assert ratios == sorted(ratios) and len(set(sizes)) == len(sizes) >= 10
  for size in sizes:
    assert size.height % factor == size.width % factor == 0
    # The name is the side that a video of 16:9 has, or nearly.
    area = (int(name) ** 2 * 16 / 9) ** 0.5
    assert 0.8 < (size.height * size.width) ** 0.5 / area < 1.1


@pytest.mark.parametrize(
  ("shape", "factor", "expected"),
  [
    ((480, 832), 32, "480x832"),
    ((1080, 1920), 32, "480x832"),
    ((1920, 1080), 32, "832x480"),
    ((100, 1000), 32, "448x896"),
    ((500, 500), 64, "640x640"),
    ((700, 1280), 64, "448x832"),
    # Either side of the geometric mean of 480/832 and 512/768, 0.6202.
    ((1000, 1620), 32, "480x832"),
    ((1000, 1605), 32, "512x768"),
  ],
)
def test_nearest_ratio(shape, factor, expected):
  sizes = buckets.find("480", factor)
  assert str(buckets.nearest(*shape, sizes)) == expected


def test_own_sizes_and_what_is_refused():
  assert buckets.find("64x96") == (buckets.Size(64, 96),)
  assert [*map(str, buckets.find("64x96,96x64"))] == ["64x96", "96x64"]
  for name, factor, words in (
    ("64x96", 64, "no multiple of 64"),
    ("1080", 64, "480, 720, HEIGHTxWIDTH"),
    ("0x64", 32, "no buckets '0x64'"),
    ("wide", 32, "no buckets 'wide'"),
    ("64x64,", 32, "no buckets '64x64,'"),
    ("64x64,64x65", 32, "the size 64x65 is no multiple"),
  ):
    with pytest.raises(errors.UserError, match=re.escape(words)):
      buckets.find(name, factor)


def _frame(height, width, seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, 256, (height, width, 3), np.uint8)


def test_a_frame_of_the_size_stays_as_it_is():
  frame = _frame(32, 64)
  assert buckets.fit(frame, buckets.Size(32, 64)) is frame


def test_the_middle_is_kept_and_the_shape_of_things_too():
  """A disc in the middle stays a disc in the middle."""
  y, x = np.mgrid[:90, :200]
  disc = (np.hypot(y - 44.5, x - 99.5) < 30)[..., None]
  frame = np.where(disc, 255, 0).astype(np.uint8).repeat(3, -1)
  found = buckets.fit(frame, buckets.Size(64, 64))[..., 0] > 127
  rows, columns = (found.sum(axis=1).max(), found.sum(axis=0).max())
  assert rows == columns == pytest.approx(60 * 64 / 90, abs=1.5)
  assert (found == found[::-1]).all() and (found == found[:, ::-1]).all()


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(90, 200), (50, 33), (20, 30), (64, 130)])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32)])
def test_resizing_is_torchs(shape, size):
  import torch

  frame = _frame(*shape)
  height, width = shape
  scale = max(size[0] / height, size[1] / width)
  whole = (
    max(size[0], round(height * scale)),
    max(size[1], round(width * scale)),
  )
  resized = torch.nn.functional.interpolate(
    torch.from_numpy(frame).permute(2, 0, 1)[None].float(),
    size=whole,
    mode="bilinear",
    antialias=False,
  )[0].permute(1, 2, 0)
  top, left = ((w - s) // 2 for w, s in zip(whole, size, strict=True))
  expected = resized[top : top + size[0], left : left + size[1]].numpy()
  found = buckets.fit(frame, buckets.Size(*size))
  assert found.shape == (*size, 3) and found.dtype == np.uint8
  assert np.abs(found - expected).max() <= 0.5 + 1e-3
