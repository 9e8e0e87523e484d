"""Contact sheets show the right frames in the right places."""

import numpy as np
import pytest

from dcvideogen_jax.eval import contact_sheet


def videos(n, t=7, h=3, w=5):
  shape = (n, t, h, w, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_frames_are_where_they_belong(n):
  given = videos(n)
  found = contact_sheet.strips(given, frames=3, across=4)
  across, rows = min(4, n), -(-n // 4)
  assert found.shape == (rows * 5 - 2, across * 17 - 2, 3)
  for i in range(n):
    top, left = 5 * (i // 4), 17 * (i % 4)
    for j, frame in enumerate((0, 3, 6)):
      shown = found[top : top + 3, left + 5 * j : left + 5 * j + 5]
      np.testing.assert_array_equal(shown, given[i, frame])
  if n == 5:
    assert (found[5:, 17:] == 224).all()


def test_no_more_than_there_is():
  given = videos(2, t=2)
  found = contact_sheet.strips(given, frames=9, across=9)
  assert found.shape == (3, 2 * 12 - 2, 3)
  with pytest.raises(ValueError, match="no videos"):
    contact_sheet.strips(given[:0])
