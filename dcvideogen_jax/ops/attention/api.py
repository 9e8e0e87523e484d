"""Chooses how attention is computed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax.ops.attention.chunked import chunked
from dcvideogen_jax.ops.attention.reference import reference

# Weights of all heads together (numbers) that `reference` may hold at once.
_SMALL = 2**22


# The widest head of cuDNN's fused attention on every GPU it runs on.
_CUDNN_WIDEST = 128


def _cudnn(q, k, v):
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"cudnn computes bfloat16 and float16, found {q.dtype}"
    )
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _has_cudnn() -> bool:
  """Whether the default device is NVIDIA's and recent enough."""
  if jax.default_backend() != "gpu":
    return False
  try:
    return float(jax.devices()[0].compute_capability) >= 8
  except (AttributeError, ValueError):  # Another vendor's.
    return False


IMPLEMENTATIONS = {"reference": reference, "chunked": chunked, "cudnn": _cudnn}


def attention(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  *,
  implementation: str | None = None,
) -> Float[Array, "b n k e"]:
  """softmax(q k' / sqrt(e)) v, each head on its own, softmax in float32.

  Args:
    q: queries of `n` tokens, `k` heads of width `e`.
    k: keys of `m` tokens.
    v: values of `m` tokens, of the dtype that is returned.
    implementation: a key of `IMPLEMENTATIONS`, which never falls back; None
      takes cuDNN for half precision and heads of up to 128 on a GPU, and
      otherwise `reference` where the matrix of weights is small and `chunked`
      where it is not.

  Raises:
    NotImplementedError: if the named implementation cannot compute this.
    ValueError: if there is no such implementation.
  """
  if implementation is None:
    b, n, heads, e = q.shape
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and e % 8 == 0 and e <= _CUDNN_WIDEST
    if fits and _has_cudnn():
      implementation = "cudnn"
    elif b * heads * n * k.shape[1] <= _SMALL:
      implementation = "reference"
    else:
      implementation = "chunked"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown attention {implementation!r}: expected {[*IMPLEMENTATIONS]}"
    )
  return IMPLEMENTATIONS[implementation](q, k, v)
