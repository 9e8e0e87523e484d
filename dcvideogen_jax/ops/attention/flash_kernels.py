"""The three kernels of `flash`, as Pallas runs them for one tile.

Tiles that may extend beyond the tokens are read with a mask, and their surplus
rows are zero.

The kernels' arguments are references to blocks of arrays. A program of a kernel
has one tile of tokens and loops over the tiles in `runs`, whose rows are the
first tile of a run and the tile after its last.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dcvideogen_jax.ops.attention import masks

# Value of masked logits: finite, so that m - m is 0 and not NaN.
_LOWEST = -1e30


class Shape(NamedTuple):
  """The static parameters of a kernel.

  Attributes:
    mask: None lets every query see every key.
    n, m: numbers of queries and keys.
    queries, keys: tokens of a tile.
    partial: whether each run needs a mask, from `tile_ranges.TileRanges`.
  """

  mask: masks.Mask | None
  n: int
  m: int
  queries: int
  keys: int
  partial: tuple[bool, ...]


def forward(runs, q, k, v, out, sums, *, shape: Shape) -> None:
  """Computes the attention of a tile of queries.

  Args:
    runs: runs of tiles of keys.
    q: the tile of queries.
    k, v: all keys and values.
    out: where the attention is written.
    sums: where log2 of the sums of exponentials is written, for each query.
    shape: static parameters.
  """
  rows = _tokens(pl.program_id(0), shape.queries)
  query = _read(q, rows, shape.n)
  scale = _scale(q)

  def step(partial, tile, carry):
    total, highest, weighted = carry
    columns = _tokens(tile, shape.keys)
    key, value = (_read_part(x, tile, columns, partial) for x in (k, v))
    logits = _dot(query, key.T) * scale
    if partial:
      seen = _seen(shape, rows[:, None], columns[None])
      logits = jnp.where(seen, logits, _LOWEST)
    higher = jnp.maximum(highest, logits.max(axis=1))
    weights = jnp.exp2(logits - higher[:, None])
    shrink = jnp.exp2(highest - higher)
    total = total * shrink + weights.sum(axis=1)
    weighted *= shrink[:, None]
    weighted += _dot(weights.astype(value.dtype), value)
    return total, higher, weighted

  start = (
    jnp.zeros(shape.queries, jnp.float32),
    jnp.full(shape.queries, 2 * _LOWEST, jnp.float32),
    jnp.zeros((shape.queries, q.shape[-1]), jnp.float32),
  )
  total, highest, weighted = _walk(runs, shape, step, start)
  _write(out, weighted / total[:, None], rows, shape.n)
  _write(sums, highest + jnp.log2(total), rows, shape.n)


def of_queries(runs, q, k, v, dout, sums, dots, dq, *, shape: Shape) -> None:
  """Computes the gradient of a tile of queries.

  Args:
    runs: runs of tiles of keys.
    q: the tile of queries.
    k, v: all keys and values.
    dout: gradient of the attention of the tile.
    sums: log2 of the sums of exponentials, from `forward`.
    dots: scalar products of the attention and its gradient, for each query.
    dq: where the gradient is written.
    shape: static parameters.
  """
  rows = _tokens(pl.program_id(0), shape.queries)
  query, dy, log, dot = (_read(x, rows, shape.n) for x in (q, dout, sums, dots))
  scale = _scale(q)

  def step(partial, tile, total):
    columns = _tokens(tile, shape.keys)
    key, value = (_read_part(x, tile, columns, partial) for x in (k, v))
    weights = jnp.exp2(_dot(query, key.T) * scale - log[:, None])
    if partial:
      seen = _seen(shape, rows[:, None], columns[None])
      weights = jnp.where(seen, weights, 0)
    slopes = weights * (_dot(dy, value.T) - dot[:, None])
    return total + _dot(slopes.astype(key.dtype), key)

  start = jnp.zeros((shape.queries, q.shape[-1]), jnp.float32)
  total = _walk(runs, shape, step, start)
  _write(dq, total * q.shape[-1] ** -0.5, rows, shape.n)


def of_keys(runs, q, k, v, dout, sums, dots, dk, dv, *, shape: Shape) -> None:
  """Computes the gradients of a tile of keys and of its values.

  Args:
    runs: runs of tiles of queries.
    q: all queries.
    k, v: the tile of keys and its values.
    dout, sums, dots: as for `of_queries`, of all queries.
    dk, dv: where the gradients are written.
    shape: static parameters.
  """
  columns = _tokens(pl.program_id(0), shape.keys)
  key, value = (_read(x, columns, shape.m) for x in (k, v))
  scale = _scale(q)

  def step(partial, tile, carry):
    of_key, of_value = carry
    rows = _tokens(tile, shape.queries)
    query, dy, log, dot = (
      _read_part(x, tile, rows, partial) for x in (q, dout, sums, dots)
    )
    weights = jnp.exp2(_dot(key, query.T) * scale - log[None])
    if partial:
      seen = _seen(shape, rows[None], columns[:, None])
      weights = jnp.where(seen, weights, 0)
    of_value += _dot(weights.astype(dy.dtype), dy)
    slopes = weights * (_dot(value, dy.T) - dot[None])
    of_key += _dot(slopes.astype(query.dtype), query)
    return of_key, of_value

  start = jnp.zeros((shape.keys, q.shape[-1]), jnp.float32)
  of_key, of_value = _walk(runs, shape, step, (start, start))
  _write(dk, of_key * q.shape[-1] ** -0.5, columns, shape.m)
  _write(dv, of_value, columns, shape.m)


def _walk(runs, shape: Shape, step: Callable[..., Any], carry: Any) -> Any:
  """Applies `step(partial, tile, carry)` to every tile of every run."""
  for i, partial in enumerate(shape.partial):
    body = functools.partial(step, partial)
    carry = lax.fori_loop(runs[i, 0], runs[i, 1], body, carry)
  return carry


def _scale(q) -> float:
  """Returns the factor from products of q and k to exponents of base two."""
  return math.log2(math.e) / math.sqrt(q.shape[-1])


def _tokens(tile, size: int) -> jax.Array:
  return tile * size + lax.iota(jnp.int32, size)


def _seen(shape: Shape, i, j) -> jax.Array:
  inside = (i < shape.n) & (j < shape.m)
  return inside if shape.mask is None else inside & shape.mask.sees(i, j)


def _inside(tokens, count: int, dims: int) -> jax.Array:
  inside = tokens < count
  return inside if dims == 1 else inside[:, None]


def _read(ref, tokens, count: int) -> jax.Array:
  """Reads a tile of `tokens`; those from `count` on are zero."""
  return triton.load(ref, mask=_inside(tokens, count, len(ref.shape)), other=0)


def _read_part(ref, tile, tokens, partial: bool) -> jax.Array:
  """Reads a tile out of all tokens; a partial tile may extend beyond them."""
  count, size = ref.shape[0], len(tokens)
  ref = ref.at[pl.ds(tile * size, size)]
  return _read(ref, tokens, count) if partial else ref[...]


def _write(ref, values, tokens, count: int) -> None:
  mask = _inside(tokens, count, len(ref.shape))
  triton.store(ref, values.astype(ref.dtype), mask=mask)


def _dot(a, b) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
