"""Attention in pure XLA that never holds the whole matrix of weights."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import masks
from dcvideogen_jax.ops.attention.by_chunks import serialise_gradients

# Attention weights of one head that one step holds, from measurements on a CPU
# (two cores, 12 heads of 128): fewer make too many small products, more do not
# fit into the caches.
WEIGHTS = 2**20

# Largest number of bands into which a mask cuts the queries. A band attends to
# the keys that any of its queries sees, so that a mask of many blocks computes
# at most about 1 / BANDS of all pairs in vain.
BANDS = 32


def chunked(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
) -> Float[Array, "b n k e"]:
  """Computes `reference` for some queries of one head at a time.

  The backward pass rematerialises the attention weights, so that it holds no
  more of them than the forward pass.

  Args:
    q: queries of `n` tokens.
    k: keys of `m` tokens.
    v: values of `m` tokens.
    mask: which keys a query sees; None for all.
  """
  if mask is None:
    return _band(None, q, k, v)
  parts = []
  for (start, stop, keys), seen in _bands(mask, q.shape[1], k.shape[1]):
    kv = (masks.take(x, keys) for x in (k, v))
    out, k, v = serialise_gradients(_band(seen, q[:, start:stop], *kv), k, v)
    parts.append(out)
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


_Seen = Callable[[Array], Bool[Array, "rows m"]]


def _bands(
  mask: masks.Mask, n: int, m: int
) -> Iterator[tuple[masks.Segment, _Seen | None]]:
  """Joins neighbouring segments of a mask into bands of many queries.

  Yields:
    The queries and keys of a band, and a function that tells which of these
    keys a query sees, by its number in the band; None if it sees all of them.
  """
  group: list[masks.Segment] = []
  for segment in masks.segments(mask, n, m):
    group.append(segment)
    start, stop = group[0].start, segment.stop
    if (stop - start) * BANDS < n and stop < n:
      continue
    keys = masks.join(keys for one in group for keys in one.keys)
    seen = None
    if len(group) > 1:
      columns = np.concatenate([np.arange(*one) for one in keys])
      seen = functools.partial(_seen, mask, start, columns)
    yield masks.Segment(start, stop, keys), seen
    group = []


def _seen(mask, start, columns, rows):
  return mask.sees(start + rows[:, None], columns[None])


def _band(
  seen: _Seen | None,
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
) -> Float[Array, "b n k e"]:
  """Attends from the queries of a band, at most `WEIGHTS` weights at a time."""
  b, n, heads, e = q.shape
  steps = -(-n // max(1, WEIGHTS // k.shape[1]))
  rows = -(-n // steps)
  q = jnp.pad(q, ((0, 0), (0, steps * rows - n), (0, 0), (0, 0)))
  q = q.reshape(b, steps, rows, heads, e).transpose(0, 3, 1, 2, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
  # Padding queries see the keys of the last query.
  numbers = np.minimum(np.arange(steps * rows), n - 1).reshape(steps, rows)
  attend = jax.checkpoint(functools.partial(_rows, seen))

  def head(x):
    q, k, v = x
    return jax.lax.map(lambda x: attend(k, v, *x), (q, jnp.asarray(numbers)))

  flat = [x.reshape(b * heads, *x.shape[2:]) for x in (q, k, v)]
  out = jax.lax.map(head, tuple(flat))
  out = out.reshape(b, heads, steps * rows, e)[:, :, :n]
  return out.transpose(0, 2, 1, 3)


def _rows(seen, k, v, q, numbers):
  """Attends from some queries of one head, given their numbers in the band."""
  logits = jnp.einsum("ne,me->nm", q, k, preferred_element_type=jnp.float32)
  logits /= q.shape[-1] ** 0.5
  if seen is not None:
    logits = jnp.where(seen(numbers), logits, -jnp.inf)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum(
    "nm,me->ne",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return (out / total).astype(v.dtype)
