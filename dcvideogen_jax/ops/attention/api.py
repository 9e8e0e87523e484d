"""`attention`, and the choice of its implementation."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import masks
from dcvideogen_jax.ops.attention.by_chunks import MAX_CHUNKS, by_chunks
from dcvideogen_jax.ops.attention.chunked import chunked
from dcvideogen_jax.ops.attention.reference import reference

# Largest number of attention weights, over all samples and heads, for which
# `reference` is chosen.
_SMALL = 2**22

# jax's names of the GPU platform: of a device, and of the devices of a mesh.
_GPU = ("gpu", "cuda")

# Widest head that cuDNN's fused attention supports on all its GPUs.
_CUDNN_WIDEST = 128

# Inputs that the fast implementation of each accelerator supports.
_FAST = {
  "gpu": "cuDNN computes bfloat16 and float16, heads of up to "
  f"{_CUDNN_WIDEST} in multiples of 8, and masks of at most {MAX_CHUNKS} "
  "chunks, on NVIDIA GPUs of compute capability 8.0 and up",
  "tpu": "splash computes bfloat16",
}
# Slow cases that a warning has named; each is named once.
_said: set[tuple[Any, ...]] = set()


class Unsupported(errors.UserError, NotImplementedError):
  """The named implementation does not support the inputs."""


def _cudnn(q, k, v, mask=None):
  if mask is not None:
    raise NotImplementedError("cudnn computes attention without a mask")
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"cudnn computes bfloat16 and float16, found {q.dtype}"
    )
  return _of_even_tokens(q, k, v)


def _of_even_tokens(q, k, v):
  """Calls cuDNN's attention, with odd numbers of tokens padded to even ones.

  jax refuses to differentiate it for an odd number of queries or keys (seen
  with 0.10.2). One token is appended to these, and cuDNN gets the true lengths.
  Even numbers of tokens are passed unchanged.
  """
  (b, n), m = q.shape[:2], k.shape[1]
  lengths = {}
  if n % 2 or m % 2:
    q, k, v = (
      jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
      for x in (q, k, v)
    )
    lengths = {
      "query_seq_lengths": jnp.full(b, n, jnp.int32),
      "key_value_seq_lengths": jnp.full(b, m, jnp.int32),
    }
  out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)
  return out[:, :n]


def _splash(q, k, v, mask=None):
  # Pallas takes a second to import.
  from dcvideogen_jax.ops.attention import splash

  blocks = splash.blocks(device().device_kind)
  return splash.splash(q, k, v, mask, blocks=blocks)


def _pallas(q, k, v, mask=None):
  from dcvideogen_jax.ops.attention import flash

  found = device()
  if found.platform not in (*_GPU, "cpu"):
    raise NotImplementedError(
      f"pallas computes on GPUs, and slowly on CPUs, found {found.platform}"
    )
  tiles = flash.tiles(found.device_kind, q.shape[-1], q.dtype)
  interpret = found.platform == "cpu"
  return flash.flash(q, k, v, mask, tiles=tiles, interpret=interpret)


def _by_chunks(q, k, v, mask=None):
  return by_chunks(q, k, v, mask, dense=attention)


IMPLEMENTATIONS = {
  "reference": reference,
  "chunked": chunked,
  "by_chunks": _by_chunks,
  "cudnn": _cudnn,
  "pallas": _pallas,
  "splash": _splash,
}


def device() -> Any:
  """Returns the device that programs are compiled for.

  It is a device of the mesh in force, or the default device without a mesh. A
  mesh may describe absent hardware (`jax.experimental.topologies`).

  Returns:
    An object with a `platform` and a `device_kind`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.abstract_device or jax.devices()[0]


def _default(q: Array, k: Array, mask: masks.Mask | None) -> str:
  """Returns the implementation for inputs of these shapes and dtypes."""
  b, n, heads, e = q.shape
  small = b * heads * n * k.shape[1] <= _SMALL
  found = device()
  if found.platform in _GPU and _has_cudnn(found):
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and e % 8 == 0 and e <= _CUDNN_WIDEST:
      if mask is None:
        return "cudnn"
      # `pallas` has not been timed on a GPU, so it is used only if named.
      if len(mask.segments(n, k.shape[1])) <= MAX_CHUNKS:
        return "by_chunks"
  if found.platform == "tpu" and q.dtype == jnp.bfloat16 and not small:
    return "splash"
  if small:
    return "reference"
  _say_slow(found.platform, q, k, mask)
  return "chunked"


def _say_slow(platform: str, q: Array, k: Array, mask: Any) -> None:
  """Warns once that an accelerator computes attention of this kind slowly."""
  platform = "gpu" if platform in _GPU else platform
  masked = "masked " if mask is not None else ""
  kind = (platform, masked, q.shape[-1], q.dtype)
  if platform not in _FAST or kind in _said:
    return
  _said.add(kind)
  warnings.warn(
    f"{masked}attention of {q.shape[1]} queries and {k.shape[1]} keys in "
    f"{q.dtype}, heads of {q.shape[-1]}, is computed one head after the other "
    f"(`chunked`), which is slow: {_FAST[platform]}",
    stacklevel=2,
  )


def _has_cudnn(found: Any) -> bool:
  """Returns whether a GPU has cuDNN's attention; assumes it of absent GPUs."""
  there = jax.devices()[0]
  if there.platform != found.platform:
    return True
  try:
    return float(there.compute_capability) >= 8
  except (AttributeError, ValueError):  # A GPU of another vendor.
    return False


def attention(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  *,
  mask: masks.Mask | None = None,
  implementation: str | None = None,
) -> Float[Array, "b n k e"]:
  """Computes softmax(q k' / sqrt(e)) v per head, with the softmax in float32.

  Args:
    q: queries of `n` tokens, `k` heads of width `e`.
    k: keys of `m` tokens.
    v: values of `m` tokens; the result has their dtype.
    mask: which keys a query sees, such as `masks.BlockCausal`; None for all.
    implementation: a key of `IMPLEMENTATIONS`, which never falls back to
      another; None chooses for `device`. On a GPU, half precision and heads of
      up to 128 take cuDNN, called chunk by chunk (`by_chunks`) if a mask has at
      most `MAX_CHUNKS` chunks. On a TPU, bfloat16 with a large matrix of
      weights takes splash. Otherwise a small matrix of weights takes
      `reference` and a large one `chunked`, which on a GPU or TPU warns once.

  Raises:
    Unsupported: if the named implementation does not support the inputs.
    errors.UserError: if there is no implementation of that name.
    ValueError: if the mask does not fit the numbers of tokens.
  """
  if implementation is None:
    implementation = _default(q, k, mask)
  require(implementation)
  try:
    return IMPLEMENTATIONS[implementation](q, k, v, mask)
  except Unsupported:  # From the dense attention that `by_chunks` calls.
    raise
  except NotImplementedError as e:
    raise Unsupported(f"attention: {e}") from e


def require(implementation: str) -> None:
  """Checks the name of an implementation.

  Raises:
    errors.UserError: if there is none of that name; the message lists them all.
  """
  if implementation not in IMPLEMENTATIONS:
    raise errors.UserError(
      f"attention must be one of {', '.join(IMPLEMENTATIONS)}, found"
      f" {implementation!r}"
    )
