"""Attention masks, as functions of the index of a query and that of a key.

A mask consists of plain integers. It is hashable and static, so that programs
are compiled for it, and no array of queries by keys is ever needed.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

from dcvideogen_jax.arrays import Array


class Segment(NamedTuple):
  """Neighbouring queries that see the same keys.

  Attributes:
    start, stop: range of the queries.
    keys: one or two ranges of keys, in order, with other keys between them.
  """

  start: int
  stop: int
  keys: tuple[tuple[int, int], ...]


# Not tuples: two kinds of mask with the same numbers must not be equal.
@dataclasses.dataclass(frozen=True)
class BlockCausal:
  """Inside a block every token sees every token; across blocks only the past.

  Query `i` sees key `j` if `j // block <= (q_offset + i) // block`.

  Attributes:
    block: tokens of a block.
    q_offset: keys before the first query, such as those of a KV cache.
  """

  block: int
  q_offset: int = 0

  def sees(self, i: Any, j: Any) -> Any:
    """Returns whether queries `i` see keys `j`: numbers, arrays or tracers."""
    return j // self.block <= (self.q_offset + i) // self.block

  def segments(self, n: int, m: int) -> list[Segment]:
    """Returns the segments of `n` queries and `m` keys, in order.

    Neighbouring segments see different keys.

    Raises:
      ValueError: if `block` is not positive or `q_offset` is negative.
    """
    if self.block < 1 or self.q_offset < 0:
      raise ValueError(
        f"a mask has a block of at least 1 and q_offset at least 0: {self}"
      )
    block = self.block
    bounds = range((self.q_offset // block + 1) * block, m, block)
    found, start = [], 0
    for end in bounds:
      stop = min(end - self.q_offset, n)
      found.append(Segment(start, stop, ((0, end),)))
      if stop == n:
        return found
      start = stop
    return [*found, Segment(start, n, ((0, m),))]


@dataclasses.dataclass(frozen=True)
class TeacherForcing:
  """Attention in a clean copy of blocks, followed by a noisy copy of them.

  A clean token sees the clean tokens of its own block and of the blocks before
  it. A noisy token sees the noisy tokens of its own block and the clean tokens
  of the blocks before it. Queries and keys are the same tokens.

  Attributes:
    block: tokens of a block.
    clean: tokens of the clean copy, which comes first.
  """

  block: int
  clean: int

  def sees(self, i: Any, j: Any) -> Any:
    """Returns whether queries `i` see keys `j`: numbers, arrays or tracers."""
    noisy, noise = i >= self.clean, j >= self.clean
    # Numbers of the blocks in their copy; `noisy` and `noise` count as 0 or 1.
    query = (i - self.clean * noisy) // self.block
    key = (j - self.clean * noise) // self.block
    past = ~noise & (key < query)
    return past | ((noisy == noise) & (key == query))

  def segments(self, n: int, m: int) -> list[Segment]:
    """Returns the segments of `n` queries and `m` keys, in order.

    Neighbouring segments see different keys.

    Raises:
      ValueError: if `block` is not positive, `n` is not `m`, or `clean` is
        negative or more than `n`.
    """
    if self.block < 1 or n != m or not 0 <= self.clean <= n:
      raise ValueError(
        "teacher forcing has a block of at least 1, equally many queries and "
        f"keys, and at least the clean ones: {self} with {n} and {m}"
      )
    found = []
    for start in range(0, self.clean, self.block):
      stop = min(start + self.block, self.clean)
      found.append(Segment(start, stop, ((0, stop),)))
    for start in range(self.clean, n, self.block):
      stop, past = min(start + self.block, n), start - self.clean
      ranges = ((0, min(past, self.clean)), (start, stop))
      found.append(Segment(start, stop, join(ranges)))
    return found


Mask = BlockCausal | TeacherForcing


def segments(mask: Mask | None, n: int, m: int) -> list[Segment]:
  """Returns `mask.segments(n, m)`.

  Args:
    mask: None gives one segment, in which every query sees every key.
    n, m: numbers of queries and keys.
  """
  return [Segment(0, n, ((0, m),))] if mask is None else mask.segments(n, m)


def visible(mask: Mask, n: int, m: int) -> Bool[np.ndarray, "n m"]:
  """Returns a mask as an array.

  Args:
    mask: the mask.
    n, m: numbers of queries and keys.

  Raises:
    ValueError: if the mask does not fit these numbers.
  """
  mask.segments(n, m)  # Raises if the mask does not fit.
  return mask.sees(np.arange(n)[:, None], np.arange(m))


def area(mask: Mask | None, n: int, m: int) -> int:
  """Returns the number of pairs of a query and a key that it sees.

  Args:
    mask: None lets every query see every key.
    n, m: numbers of queries and keys.
  """
  return sum(
    (stop - start) * sum(high - low for low, high in keys)
    for start, stop, keys in segments(mask, n, m)
  )


@functools.lru_cache(maxsize=64)
def tiles(
  mask: Mask | None, n: int, m: int, queries: int, keys: int
) -> Int[np.ndarray, "i j"]:
  """Returns the number of visible pairs of query and key in each tile of both.

  The largest array that this holds is the result.

  Args:
    mask: None lets every query see every key.
    n, m: numbers of queries and keys; the last tiles may extend beyond them.
    queries, keys: queries and keys of a tile.

  Returns:
    Read-only, for tiles `i` of queries and `j` of keys.
  """
  found = np.zeros((-(-n // queries), -(-m // keys)), np.int64)
  for start, stop, ranges in segments(mask, n, m):
    rows, heights = _overlaps(start, stop, queries)
    for low, high in ranges:
      columns, widths = _overlaps(low, high, keys)
      found[rows, columns] += heights[:, None] * widths
  found.flags.writeable = False
  return found


def _overlaps(start: int, stop: int, size: int) -> tuple[slice, np.ndarray]:
  """Returns the tiles that a range meets, and its length in each of them."""
  low, high = start // size, -(-stop // size)
  edges = np.clip(np.arange(low, high + 1) * size, start, stop)
  return slice(low, high), np.diff(edges)


def take(
  x: Shaped[Array, "b m ..."], ranges: Sequence[tuple[int, int]]
) -> Shaped[Array, "b m2 ..."]:
  """Concatenates the tokens of ranges."""
  parts = [x[:, low:high] for low, high in ranges]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def join(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Sorts ranges, drops empty ranges and joins those that touch or overlap."""
  found: list[tuple[int, int]] = []
  for low, high in sorted(ranges):
    if low >= high:
      continue
    if found and low <= found[-1][1]:
      found[-1] = found[-1][0], max(high, found[-1][1])
    else:
      found.append((low, high))
  return tuple(found)
