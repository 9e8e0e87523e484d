"""Splash attention: the Pallas kernel for TPUs that comes with jax.

It walks over blocks of queries and keys, and never holds the matrix of weights.
Tokens are filled up to whole blocks; keys that fill are masked in the kernel,
so that they have a weight of exactly zero, forward and backward.

A TPU takes the factors of its products in bfloat16, whatever the inputs' dtype.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info,
)
from jaxtyping import Array, Float

# Numbers of a row of a vector register: blocks and heads are multiples of it.
LANES = 128


class Blocks(NamedTuple):
  """The most tokens of a block, multiples of `LANES`.

  Attributes:
    queries: of the forward pass.
    keys: of the forward pass.
    queries_back: of the backward pass; divides `queries`.
    keys_back: of the backward pass; divides `keys`.
    products: keys whose products with a block of queries are held at once;
      divides `keys_back`.
  """

  queries: int
  keys: int
  queries_back: int
  keys_back: int
  products: int


# By the kind of a device. Each compiles for heads of 128 in bfloat16, which
# bounds them: vector memory is 16 MiB for a kernel, 32 MiB on v6e. With 512
# queries a block already computes longer than it waits for its keys; more of
# them let each start of a block, a third of a microsecond, weigh less. None is
# timed on hardware.
BLOCKS: Mapping[str, Blocks] = {
  "TPU v4": Blocks(1024, 1024, 512, 512, 512),
  "TPU v5 lite": Blocks(1024, 1024, 512, 512, 512),
  "TPU v5": Blocks(1024, 2048, 512, 1024, 512),
  "TPU v6 lite": Blocks(2048, 2048, 1024, 1024, 512),
}
_OTHER = Blocks(512, 512, 512, 512, 512)


def blocks(kind: str) -> Blocks:
  """The blocks for a kind of device; small ones for one that is not known."""
  return BLOCKS.get(kind, _OTHER)


def splash(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  *,
  blocks: Blocks,
  interpret: bool = False,
) -> Float[Array, "b n k e"]:
  """`reference` by the kernel, which compiles for TPUs only.

  Args:
    q: queries of `n` tokens, `k` heads of width `e`.
    k: keys of `m` tokens.
    v: values of `m` tokens.
    blocks: such as a row of `BLOCKS`.
    interpret: compute what the kernel would on any device, slowly.
  """
  n, m = q.shape[1], k.shape[1]
  rows, (block_q, back_q) = _fit(n, blocks.queries, blocks.queries_back)
  keys, (block_k, back_k, products) = _fit(
    m, blocks.keys, blocks.keys_back, blocks.products
  )
  # No information on blocks: all of them are computed.
  info = mask_info.MaskInfo(
    data_next=None,
    mask_next=None,
    block_mask=None,
    partial_mask_blocks=None,
    q_sequence=np.arange(rows, dtype=np.int32) if keys > m else None,
  )
  attend = kernel.SplashAttentionKernel(
    info,
    info,
    info,
    block_sizes=kernel.BlockSizes(
      block_q=block_q,
      block_kv=block_k,
      block_kv_compute=products,
      block_q_dkv=back_q,
      block_kv_dkv=back_k,
      block_kv_dkv_compute=products,
      block_q_dq=back_q,
      block_kv_dq=back_k,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=_before(m) if keys > m else None,
    interpret=interpret,
  )
  q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
    for x, size in ((q, rows), (k, keys), (v, keys))
  )
  # Without residuals, the kernel gives one array.
  out: Any = jax.vmap(attend)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))
  return out.transpose(0, 2, 1, 3)[:, :n].astype(v.dtype)


def _fit(tokens: int, *most: int) -> tuple[int, tuple[int, ...]]:
  """How many tokens there are with those that fill, and the sizes of blocks.

  Args:
    tokens: as given.
    *most: sizes of blocks, each of which divides the one before.

  Returns:
    Sizes of at most `most` that divide the number of tokens and each other. The
    largest ones are filled about evenly.
  """
  count = -(-tokens // most[0])
  tokens = -(-tokens // count)
  if tokens <= most[-1]:
    block = -(-tokens // LANES) * LANES
    return count * block, (block,) * len(most)
  unit = LANES * most[0] // most[-1]
  block = -(-tokens // unit) * unit
  return count * block, tuple(block * size // most[0] for size in most)


@functools.cache
def _before(m: int) -> Callable[[Array, Array], Array]:
  """A mask that lets the first `m` keys through; the same object each time."""
  return lambda query, key: key < m
