"""Masked attention as dense attention of one chunk of queries at a time.

Queries that see the same keys attend to exactly those, by whatever computes
dense attention best, so that nothing masked is computed or read, forward and
backward. Gradients of keys are added up over chunks in the dtype of the keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax.ops.attention import masks

# More chunks make programs that take minutes to compile.
MAX_CHUNKS = 256


def by_chunks(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
  *,
  dense: Callable[[Array, Array, Array], Array],
) -> Float[Array, "b n k e"]:
  """`reference` by calls of `dense`, which attends to all keys it is given.

  Raises:
    NotImplementedError: if there are more than `MAX_CHUNKS` chunks.
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
  """The identity, which serialises the sums of dK and dV in the backward pass.

  Otherwise XLA would hold the gradients of keys and values of all chunks, and
  add them up in the end.

  Args:
    out: of a chunk.
    k, v: keys and values for this chunk and the others.

  Returns:
    All three, for what comes after the chunk.
  """
  return out, k, v


serialise_gradients.defvjp(
  lambda *x: (x, None), lambda _, x: jax.lax.optimization_barrier(x)
)
