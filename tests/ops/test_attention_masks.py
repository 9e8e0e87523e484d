"""Masks against their definition; areas, segments and tiles made from them."""

import numpy as np
import pytest

from dcvideogen_jax.ops.attention import BlockCausal, TeacherForcing, masks
from dcvideogen_jax.ops.attention.tile_ranges import tile_ranges


def _sees(mask, i, j):
  """Tells whether a query sees a key, in plain Python."""
  if isinstance(mask, BlockCausal):
    return j // mask.block <= (mask.q_offset + i) // mask.block
  noisy, noise = i >= mask.clean, j >= mask.clean
  chunk = (i - noisy * mask.clean) // mask.block
  other = (j - noise * mask.clean) // mask.block
  if noise:
    return noisy and other == chunk
  return other < chunk if noisy else other <= chunk


def _fuzzed(seed):
  """Draws a mask, and numbers of queries and keys."""
  random = np.random.default_rng(seed)
  block, n, m, offset = (int(x) for x in random.integers(1, 40, 4))
  if seed % 3:
    return BlockCausal(block, offset * (seed % 3 - 1)), n, m
  return TeacherForcing(block, int(random.integers(n + 1))), n, n


CASES = [
  (BlockCausal(4), 8, 8),
  (BlockCausal(1), 5, 9),
  (BlockCausal(100), 3, 7),
  (BlockCausal(4, 6), 5, 11),
  (TeacherForcing(3, 7), 14, 14),
  (TeacherForcing(3, 0), 4, 4),
  (TeacherForcing(50, 7), 14, 14),
  *map(_fuzzed, range(60)),
]


@pytest.mark.parametrize(("mask", "n", "m"), CASES)
def test_a_mask_is_what_it_says(mask, n, m):
  expected = np.array([[_sees(mask, i, j) for j in range(m)] for i in range(n)])
  np.testing.assert_array_equal(masks.visible(mask, n, m), expected)
  assert masks.area(mask, n, m) == expected.sum()
  assert expected.any(axis=1).all()

  found = np.zeros((n, m), bool)
  segments = mask.segments(n, m)
  for (start, stop, keys), (after, _, others) in zip(
    segments, [*segments[1:], (n, None, ())], strict=True
  ):
    assert start < stop == after
    assert keys != others
    for low, high in keys:
      assert low < high
      found[start:stop, low:high] = True
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("mask", "n", "m"), [(None, 21, 10), *CASES])
def test_runs_walk_over_what_is_visible_and_nothing_else(mask, n, m):
  seen = np.ones((n, m), bool) if mask is None else masks.visible(mask, n, m)
  queries, keys = 4, 8
  tiles = np.zeros((-(-n // queries), queries, -(-m // keys), keys), bool)
  tiles.reshape(tiles.shape[0] * queries, -1)[:n, :m] = seen
  np.testing.assert_array_equal(
    masks.tiles(mask, n, m, queries, keys), tiles.sum(axis=(1, 3))
  )
  for across in (False, True):
    # Padding on the side that is iterated over needs no mask.
    some = tiles.any(axis=(1, 3))
    whole = _padded(seen, queries, keys, across)
    if across:
      some, whole = some.T, whole.T
    found = tile_ranges(mask, n, m, queries, keys, across)
    assert found.tiles == some.sum()
    assert len(found.bounds) == len(some)
    for tile, row in enumerate(found.bounds):
      walked = []
      for (low, high), partial in zip(row, found.partial, strict=True):
        walked += range(low, high)
        assert partial or whole[tile, low:high].all()
      assert walked == np.flatnonzero(some[tile]).tolist()


def _padded(seen, queries, keys, across):
  """Tells which tiles need no mask if padding of the iterated side is seen."""
  n, m = seen.shape
  filled = np.zeros((-(-n // queries) * queries, -(-m // keys) * keys), bool)
  filled[:n, :m] = seen
  if across:
    filled[:, m:] = filled[:, m - 1 : m]
  else:
    filled[n:] = filled[n - 1]
  shape = -1, queries, filled.shape[1] // keys, keys
  return filled.reshape(shape).all(axis=(1, 3))


def test_most_tiles_need_no_mask():
  """With chunks larger than tiles, most tiles are computed without a mask."""
  for mask in (BlockCausal(100), TeacherForcing(100, 300)):
    for across in (False, True):
      found = tile_ranges(mask, 600, 600, 16, 16, across)
      sizes = np.diff(found.bounds, axis=2)[..., 0].sum(axis=0)
      assert sizes[found.partial.index(False)] > found.tiles / 2
      assert found.partial.count(False) == 1


@pytest.mark.parametrize(
  ("mask", "n", "m"),
  [
    (BlockCausal(0), 4, 4),
    (BlockCausal(2, -1), 4, 4),
    (TeacherForcing(0, 2), 4, 4),
    (TeacherForcing(2, 2), 4, 6),
    (TeacherForcing(2, 5), 4, 4),
  ],
)
def test_masks_that_are_none(mask, n, m):
  with pytest.raises(ValueError, match="at least"):
    masks.visible(mask, n, m)


def test_masks_of_two_kinds_are_never_equal():
  """Masks are keys of caches."""
  block, forced = BlockCausal(4, 8), TeacherForcing(4, 8)
  assert block != forced and len({block, forced}) == 2
  assert block == BlockCausal(4, 8) and len({block, BlockCausal(4, 8)}) == 1
