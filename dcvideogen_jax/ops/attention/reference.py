"""The definition of attention, with the whole matrix of weights in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reference(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
) -> Float[Array, "b n k e"]:
  """softmax(q k' / sqrt(e)) v per head, with the softmax in float32."""
  # Heads first: XLA's CPU backend then uses its better matrix product, which
  # matters for the hundreds of equal tokens that end a short prompt.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  logits = jnp.einsum(
    "bkne,bkme->bknm", q, k, preferred_element_type=jnp.float32
  )
  weights = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1)
  return (weights.astype(v.dtype) @ v).transpose(0, 2, 1, 3)
