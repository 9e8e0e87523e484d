"""The definition of attention, with the whole matrix of weights in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import masks

# Weighted values are summed over blocks of this many keys, then over the
# blocks. Wan pads every prompt with hundreds of equal tokens, over which one
# running sum in float32 loses digits.
_BLOCK = 64


def reference(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
) -> Float[Array, "b n k e"]:
  """Computes softmax(q k' / sqrt(e)) v per head, softmax and sums in float32.

  Args:
    q: queries of `n` tokens.
    k: keys of `m` tokens.
    v: values of `m` tokens; the result has their dtype.
    mask: which keys a query sees; None for all.
  """
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  logits = jnp.einsum(
    "bkne,bkme->bknm", q, k, preferred_element_type=jnp.float32
  )
  if mask is not None:
    seen = masks.visible(mask, *logits.shape[2:])
    logits = jnp.where(seen, logits, -jnp.inf)
  weights = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1)
  missing = -v.shape[2] % _BLOCK
  weights = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, missing)))
  values = v.astype(jnp.float32)
  values = jnp.pad(values, ((0, 0), (0, 0), (0, missing), (0, 0)))
  sums = jnp.einsum(
    "bknjm,bkjme->bknje",
    weights.reshape(*weights.shape[:-1], -1, _BLOCK),
    values.reshape(*v.shape[:2], -1, _BLOCK, v.shape[-1]),
  )
  return sums.sum(axis=3).astype(v.dtype).transpose(0, 2, 1, 3)
