"""Masked attention as dense attention of one chunk of queries at a time.

Queries that see the same keys form a chunk, which attends to exactly these keys
with the best implementation of dense attention. No masked pair is computed or
read, forward or backward. Gradients of keys are summed over chunks in the dtype
of the keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import masks

# Programs of more chunks take minutes to compile.
MAX_CHUNKS = 256


def by_chunks(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
  *,
  dense: Callable[[Array, Array, Array], Array],
) -> Float[Array, "b n k e"]:
  """Computes `reference` by one call of dense attention per chunk of queries.

  Args:
    q: queries of `n` tokens.
    k: keys of `m` tokens.
    v: values of `m` tokens.
    mask: which keys a query sees; None for all.
    dense: attention of queries to all of the keys that it is given.

  Raises:
    NotImplementedError: if the mask has more than `MAX_CHUNKS` chunks.
    ValueError: if the mask does not fit the numbers of tokens.
  """
  segments = masks.segments(mask, q.shape[1], k.shape[1])
  if len(segments) > MAX_CHUNKS:
    raise NotImplementedError(
      f"by_chunks computes at most {MAX_CHUNKS} chunks, found {len(segments)}"
    )
  parts = []
  for start, stop, keys in segments:
    out = dense(q[:, start:stop], *(masks.take(x, keys) for x in (k, v)))
    out, k, v = serialise_gradients(out, k, v)
    parts.append(out)
  return jnp.concatenate(parts, axis=1)


@jax.custom_vjp
def serialise_gradients(out, k, v):
  """Returns its arguments, and serialises the sums of dK and dV.

  Without this, XLA would hold the gradients of the keys and values of all
  chunks in the backward pass, and sum them at the end.

  Args:
    out: output of a chunk.
    k, v: keys and values of all chunks.

  Returns:
    All three; later chunks use these keys and values.
  """
  return out, k, v


serialise_gradients.defvjp(
  lambda *x: (x, None), lambda _, x: jax.lax.optimization_barrier(x)
)
