"""Attention in pure XLA that never holds the whole matrix of weights."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Numbers of weights that one step holds per head, measured on a CPU (two
# cores, 12 heads of 128): fewer start too many small products, more leave the
# caches.
WEIGHTS = 2**20


def chunked(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
) -> Float[Array, "b n k e"]:
  """`reference`, some queries of one head at a time.

  The backward pass computes the weights again, so that it needs no more.
  """
  b, n, heads, e = q.shape
  steps = -(-n // max(1, WEIGHTS // k.shape[1]))
  rows = -(-n // steps)
  q = jnp.pad(q, ((0, 0), (0, steps * rows - n), (0, 0), (0, 0)))
  q = q.reshape(b, steps, rows, heads, e).transpose(0, 3, 1, 2, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))

  def head(x):
    q, k, v = x
    return jax.lax.map(functools.partial(_rows, k, v), q)

  flat = [x.reshape(b * heads, *x.shape[2:]) for x in (q, k, v)]
  out = jax.lax.map(head, tuple(flat))
  out = out.reshape(b, heads, steps * rows, e)[:, :, :n]
  return out.transpose(0, 2, 1, 3)


@jax.checkpoint
def _rows(k, v, q):
  logits = jnp.einsum("ne,me->nm", q, k, preferred_element_type=jnp.float32)
  logits /= q.shape[-1] ** 0.5
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum(
    "nm,me->ne",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return (out / total).astype(v.dtype)
