"""The three kernels of `flash`, as Pallas runs them for one tile.

Tiles are read with a mask wherever they may reach beyond the tokens, and so are
zero there.
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
  """What is known before a kernel is compiled.

  Attributes:
    mask: None sees everything.
    n, m: numbers of queries and keys.
    queries, keys: of a tile.
    partial: of `tile_ranges.TileRanges`.
  """

  mask: masks.Mask | None
  n: int
  m: int
  queries: int
  keys: int
  partial: tuple[bool, ...]


def forward(runs, q, k, v, out, sums, *, shape: Shape) -> None:
  """Output and log of the sum of exponentials, of base two, of its queries."""
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
  """Gradient of its queries.

  `dots` are the products of the output and its gradient.
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
  """Gradients of its keys and values."""
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
  """`step(partial, tile, carry)` for every tile of every run."""
  for i, partial in enumerate(shape.partial):
    body = functools.partial(step, partial)
    carry = lax.fori_loop(runs[i, 0], runs[i, 1], body, carry)
  return carry


def _scale(q) -> float:
  """What makes exponents of base two of products."""
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
  """A tile of `tokens`, of which `count` are there."""
  return triton.load(ref, mask=_inside(tokens, count, len(ref.shape)), other=0)


def _read_part(ref, tile, tokens, partial: bool) -> jax.Array:
  """A tile out of all tokens; one that is partial may reach beyond them."""
  count, size = ref.shape[0], len(tokens)
  ref = ref.at[pl.ds(tile * size, size)]
  return _read(ref, tokens, count) if partial else ref[...]


def _write(ref, values, tokens, count: int) -> None:
  mask = _inside(tokens, count, len(ref.shape))
  triton.store(ref, values.astype(ref.dtype), mask=mask)


def _dot(a, b) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
