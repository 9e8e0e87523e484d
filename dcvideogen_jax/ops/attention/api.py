"""Chooses how attention is computed."""

from typing import Any

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


def _splash(q, k, v):
  # Pallas takes a second to import.
  from dcvideogen_jax.ops.attention import splash

  return splash.splash(q, k, v, blocks=splash.blocks(device().device_kind))


IMPLEMENTATIONS = {
  "reference": reference,
  "chunked": chunked,
  "cudnn": _cudnn,
  "splash": _splash,
}


def device() -> Any:
  """What the computation is for: of the mesh in force, or the default device.

  A mesh may be of devices that are not there (`jax.experimental.topologies`).

  Returns:
    Something with a `platform` and a `device_kind`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.abstract_device or jax.devices()[0]


def _default(q: Array, k: Array) -> str:
  """The implementation for inputs of these shapes and dtypes."""
  b, n, heads, e = q.shape
  small = b * heads * n * k.shape[1] <= _SMALL
  found = device()
  if found.platform in ("gpu", "cuda") and _has_cudnn(found):
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and e % 8 == 0 and e <= _CUDNN_WIDEST:
      return "cudnn"
  if found.platform == "tpu" and q.dtype == jnp.bfloat16 and not small:
    return "splash"
  return "reference" if small else "chunked"


def _has_cudnn(found: Any) -> bool:
  """Whether a GPU is NVIDIA's and recent enough; those not there are."""
  there = jax.devices()[0]
  if there.platform != found.platform:
    return True
  try:
    return float(there.compute_capability) >= 8
  except (AttributeError, ValueError):  # Another vendor's.
    return False


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
      takes, for `device`, cuDNN for half precision and heads of up to 128 on a
      GPU and splash for bfloat16 on a TPU, and otherwise `reference` where the
      matrix of weights is small and `chunked` where it is not.

  Raises:
    NotImplementedError: if the named implementation cannot compute this.
    ValueError: if there is no such implementation.
  """
  if implementation is None:
    implementation = _default(q, k)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown attention {implementation!r}: expected {[*IMPLEMENTATIONS]}"
    )
  return IMPLEMENTATIONS[implementation](q, k, v)
