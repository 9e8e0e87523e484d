"""Finds the runs of tiles of keys that each tile of queries sees."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dcvideogen_jax.ops.attention import masks


class TileRanges(NamedTuple):
  """The runs of tiles that a kernel loops over, for each tile of its grid.

  Attributes:
    bounds: first tile of every run and the tile after its last, which are equal
      for an empty run; runs are in order.
    partial: whether the tiles of each run need a mask.
    tiles: number of tiles in all runs of all tiles of the grid.
  """

  bounds: Int[np.ndarray, "tiles runs 2"]
  partial: tuple[bool, ...]
  tiles: int


@functools.lru_cache(maxsize=64)
def tile_ranges(
  mask: masks.Mask | None,
  n: int,
  m: int,
  queries: int,
  keys: int,
  across: bool = False,
) -> TileRanges:
  """Returns the runs of tiles of keys that each tile of queries sees.

  Args:
    mask: None lets every query see every key.
    n, m: numbers of queries and keys.
    queries, keys: tokens of a tile.
    across: returns for each tile of keys the runs of queries that see it.
  """
  seen = masks.tiles(mask, n, m, queries, keys)
  sizes = (n, queries), (m, keys)
  if across:
    seen, sizes = seen.T, sizes[::-1]
  (tokens, size), (_, walked) = sizes
  found = []
  for i, row in enumerate(seen):
    whole = row == min(size, tokens - i * size) * walked
    found.append(_split(_ranges(row > 0), whole))
  before, after = (max(len(row[i]) for row in found) for i in (0, 2))
  table = np.array(
    [
      first
      + [(0, 0)] * (before - len(first))
      + [full]
      + last
      + [(0, 0)] * (after - len(last))
      for first, full, last in found
    ],
    np.int32,
  )
  partial = np.array([True] * before + [False] + [True] * after)
  used = (table[..., 0] < table[..., 1]).any(axis=0)
  return TileRanges(
    table[:, used],
    tuple(partial[used].tolist()),
    int((table[..., 1] - table[..., 0]).sum()),
  )


def _ranges(flags: np.ndarray) -> list[tuple[int, int]]:
  """Returns the ranges in which flags are set."""
  edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
  return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _split(ranges, whole):
  """Splits ranges at the longest run of whole tiles within the first range.

  Returns the ranges before that run, the run, and the ranges after it.
  """
  if not ranges:
    return [], (0, 0), []
  (start, stop), *others = ranges
  low, high = max(
    _ranges(whole[start:stop]), key=lambda r: r[1] - r[0], default=(0, 0)
  )
  low, high = start + low, start + high
  edges = [(start, low)] if start < low else []
  rest = [(high, stop)] if high < stop else []
  return edges, (low, high), [*rest, *others]
