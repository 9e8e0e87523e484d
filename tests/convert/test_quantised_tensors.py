"""The inner form of weights of few bits."""

import ml_dtypes
import numpy as np
import pytest

from dcvideogen_jax.convert.quantised_tensors import Quantised

SHAPE = (10, 12)
# One scale for all, one per row, one per column; blocks that fit, and that do
# not.
BLOCKS = [SHAPE, (1, 12), (10, 1), (1, 4), (5, 3), (4, 5), (128, 128)]


def random_weight(block, dtype, with_offsets=False):
  random = np.random.default_rng(7)
  grid = tuple(-(-n // size) for n, size in zip(SHAPE, block, strict=True))
  scales = random.uniform(0.1, 2, grid).astype(np.float32)
  offsets = random.normal(size=grid).astype(np.float32)
  values = random.integers(-100, 100, SHAPE).astype(dtype)
  return Quantised(values, scales, block, offsets if with_offsets else None)


def by_element(weight):
  """The definition, one element after another."""
  found = np.empty(weight.values.shape, np.float32)
  for i, j in np.ndindex(found.shape):
    at = i // weight.block[0], j // weight.block[1]
    found[i, j] = np.float32(weight.values[i, j]) * weight.scales[at]
    if weight.offsets is not None:
      found[i, j] += weight.offsets[at]
  return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_blocks(block, dtype, with_offsets):
  weight = random_weight(block, dtype, with_offsets)
  np.testing.assert_array_equal(weight.dequantise(), by_element(weight))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("ends", [(0, 10), (0, 3), (3, 9), (5, 10), (6, 7)])
def test_rows(block, ends):
  weight = random_weight(block, np.int8, with_offsets=True)
  expected = by_element(weight)[slice(*ends)]
  out = np.empty_like(expected)
  assert weight.take(*ends).dequantise(out) is out
  np.testing.assert_array_equal(out, expected)
