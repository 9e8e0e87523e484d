"""Which keys a query sees: masks that are functions of two indices.

A mask is made of plain integers, hashable and static, so that programs are
compiled for it; no array of queries by keys is ever needed.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped


class Segment(NamedTuple):
  """Neighbouring queries that see the same keys.

  Attributes:
    start, stop: the queries.
    keys: one or two ranges of keys, in order and apart from each other.
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
    q_offset: keys before the first query, such as those of a cached prefix.
  """

  block: int
  q_offset: int = 0

  def sees(self, i: Any, j: Any) -> Any:
    """Whether queries `i` see keys `j`; arrays that broadcast, or tracers."""
    return j // self.block <= (self.q_offset + i) // self.block

  def segments(self, n: int, m: int) -> list[Segment]:
    """All of `n` queries before `m` keys, in order; neighbours differ.

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
  """A clean and a noisy copy of the same blocks, one after the other.

  A clean token sees its own block and those before among the clean ones; a
  noisy token sees its own block among the noisy ones and those before among
  the clean ones. Queries and keys are the same tokens.

  Attributes:
    block: tokens of a block.
    clean: tokens of the clean copy, which is the first.
  """

  block: int
  clean: int

  def sees(self, i: Any, j: Any) -> Any:
    """Whether queries `i` see keys `j`; arrays that broadcast, or tracers."""
    noisy, noise = i >= self.clean, j >= self.clean
    # Numbers of blocks; `noisy` and `noise` are 0 or 1.
    query = (i - self.clean * noisy) // self.block
    key = (j - self.clean * noise) // self.block
    past = ~noise & (key < query)
    return past | ((noisy == noise) & (key == query))

  def segments(self, n: int, m: int) -> list[Segment]:
    """All of `n` queries before `m` keys, in order; neighbours differ.

    Raises:
      ValueError: if `block` is not positive, or tokens and keys are not equally
        many and at least `clean`.
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
  """`mask.segments`; without a mask, every query sees every key."""
  return [Segment(0, n, ((0, m),))] if mask is None else mask.segments(n, m)


def visible(mask: Mask, n: int, m: int) -> Bool[np.ndarray, "n m"]:
  """The definition of a mask, as an array."""
  mask.segments(n, m)  # Which raises what it raises.
  return mask.sees(np.arange(n)[:, None], np.arange(m))


def area(mask: Mask | None, n: int, m: int) -> int:
  """Pairs of a query and a key that it sees."""
  return sum(
    (stop - start) * sum(high - low for low, high in keys)
    for start, stop, keys in segments(mask, n, m)
  )


@functools.lru_cache(maxsize=64)
def tiles(
  mask: Mask | None, n: int, m: int, queries: int, keys: int
) -> Int[np.ndarray, "i j"]:
  """Pairs of a query and a key that it sees, in each tile of the two.

  Args:
    mask: None sees everything.
    n, m: numbers of queries and keys; the last tiles may reach beyond.
    queries, keys: of a tile.

  Returns:
    Not to be written to. Nothing larger was held meanwhile.
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
  """Tiles of a size that a range meets, and how much of it lies in each."""
  low, high = start // size, -(-stop // size)
  edges = np.clip(np.arange(low, high + 1) * size, start, stop)
  return slice(low, high), np.diff(edges)


def take(
  x: Shaped[Array, "b m ..."], ranges: Sequence[tuple[int, int]]
) -> Shaped[Array, "b m2 ..."]:
  """Tokens of ranges, one after the other."""
  parts = [x[:, low:high] for low, high in ranges]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def join(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """In order, without empty ranges, and with those that touch made one."""
  found: list[tuple[int, int]] = []
  for low, high in sorted(ranges):
    if low >= high:
      continue
    if found and low <= found[-1][1]:
      found[-1] = found[-1][0], max(high, found[-1][1])
    else:
      found.append((low, high))
  return tuple(found)
