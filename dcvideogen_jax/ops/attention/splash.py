"""Splash attention: the Pallas kernel for TPUs that comes with jax.

It loops over blocks of queries and keys, and never holds the matrix of weights.
Tokens are padded to whole blocks. The kernel masks the padding keys, so that
their weights are exactly zero, forward and backward.

A TPU multiplies matrices with factors in bfloat16, whatever the inputs' dtype.
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
from jaxtyping import Float

from dcvideogen_jax import flops
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import masks

# Lanes of a vector register. Block sizes and head widths are multiples of this.
LANES = 128


class Blocks(NamedTuple):
  """The largest numbers of tokens in a block, multiples of `LANES`.

  Attributes:
    queries: queries of a block in the forward pass.
    keys: keys of a block in the forward pass.
    queries_back: queries of a block in the backward pass; divides `queries`.
    keys_back: keys of a block in the backward pass; divides `keys`.
    products: keys whose products with a block of queries are held at once;
      divides `keys_back`.
  """

  queries: int
  keys: int
  queries_back: int
  keys_back: int
  products: int


# Device kind -> blocks. All of them compile for heads of 128 in bfloat16, where
# vector memory bounds their sizes: 16 MiB for a kernel, 32 MiB on v6e. With 512
# queries, computing a block already takes longer than loading its keys; with
# more queries, the start of a block (a third of a microsecond) weighs less. No
# blocks have been timed on hardware.
BLOCKS: Mapping[str, Blocks] = {
  "TPU v4": Blocks(1024, 1024, 512, 512, 512),
  "TPU v5 lite": Blocks(1024, 1024, 512, 512, 512),
  "TPU v5": Blocks(1024, 2048, 512, 1024, 512),
  "TPU v6 lite": Blocks(2048, 2048, 1024, 1024, 512),
}
_OTHER = Blocks(512, 512, 512, 512, 512)


def blocks(kind: str) -> Blocks:
  """Returns the blocks for a kind of device; small ones for an unknown kind."""
  return BLOCKS.get(kind, _OTHER)


def splash(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
  *,
  blocks: Blocks,
  interpret: bool = False,
) -> Float[Array, "b n k e"]:
  """Computes `reference` with the kernel, which compiles for TPUs only.

  Args:
    q: queries of `n` tokens, `k` heads of width `e`.
    k: keys of `m` tokens.
    v: values of `m` tokens; the result has their dtype.
    mask: which keys a query sees; None for all. Blocks that no query sees are
      neither read nor computed.
    blocks: largest blocks, such as a row of `BLOCKS`.
    interpret: whether to interpret the kernel, slowly and on any device.
  """
  n, m = q.shape[1], k.shape[1]
  rows, (block_q, back_q) = _fit(n, blocks.queries, blocks.queries_back)
  keys, (block_k, back_k, products) = _fit(
    m, blocks.keys, blocks.keys_back, blocks.products
  )
  numbers, function = None, None
  if mask is not None:
    numbers, function = _numbers(mask, n, m, rows), _function(mask, m)
  elif keys > m:
    numbers, function = np.full(rows, m, np.int32), _function(None, m)
  back = _seen(mask, (n, m), (rows, keys), (back_q, back_k))
  forward = _seen(mask, (n, m), (rows, keys), (block_q, block_k))
  attend = kernel.SplashAttentionKernel(
    _info(mask, forward, numbers),
    _info(mask, back, numbers),
    _info(mask, back, numbers, across=True),
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
    mask_function=function,
    interpret=interpret,
  )
  q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
    for x, size in ((q, rows), (k, keys), (v, keys))
  )

  # No parameter of the kernel tells `flops` how many blocks are computed.
  with flops.computed(int(forward.sum()), forward.size):
    out: Any = jax.vmap(attend)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))
  return out.transpose(0, 2, 1, 3)[:, :n].astype(v.dtype)


def _seen(
  mask: masks.Mask | None,
  tokens: tuple[int, int],
  filled: tuple[int, int],
  blocks: tuple[int, int],
) -> np.ndarray:
  """Returns for each block of queries and keys whether any pair is visible.

  Args:
    mask: None lets every query see every key.
    tokens: numbers of queries and keys.
    filled: these numbers with padding; blocks of padding alone are not visible.
    blocks: queries and keys of a block.
  """
  found = masks.tiles(mask, *tokens, *blocks) > 0
  counts = np.array(filled) // blocks
  return np.pad(found, [(0, more) for more in counts - found.shape])


def _info(
  mask: masks.Mask | None,
  seen: np.ndarray,
  numbers: np.ndarray | None,
  across: bool = False,
) -> mask_info.MaskInfo:
  """Returns which blocks the kernel computes and which it reads next.

  Args:
    mask: None leaves this information out, so that every block is computed.
    seen: which blocks are visible, from `_seen`.
    numbers: one number for each query, from `_numbers`.
    across: whether the kernel loops over queries for each block of keys.
  """
  if mask is None:
    return mask_info.MaskInfo(None, None, None, None, numbers)
  order = seen.T if across else seen
  used = np.flatnonzero(order)
  # The next used block at or after each block; after the last, the first one.
  after = np.searchsorted(used, np.arange(order.size)) % len(used)
  following = (used[after] % order.shape[1]).reshape(order.shape)
  following = following.T if across else following
  # Scalar memory is small, so take the smallest dtype.
  size = np.min_scalar_type(-max(seen.shape))
  return mask_info.MaskInfo(
    data_next=following[None].astype(size),
    mask_next=None,
    block_mask=2 * seen[None].astype(np.int8),
    partial_mask_blocks=None,
    q_sequence=numbers,
  )


def _numbers(mask: masks.Mask, n: int, m: int, rows: int) -> np.ndarray:
  """Encodes the keys that each query sees as one number, for `_function`.

  For a noisy query of `TeacherForcing` this is the start of its own block plus
  one, for any other query the number of keys that it sees from the first. With
  these numbers the kernel needs no division. The padding queries, up to `rows`,
  have the number of the last query.
  """
  found = np.empty(rows, np.int32)
  for start, stop, keys in mask.segments(n, m):
    forced = isinstance(mask, masks.TeacherForcing) and start >= mask.clean
    found[start:stop] = start + 1 if forced else keys[-1][1]
  found[n:] = found[n - 1]
  return found


@functools.cache
def _function(
  mask: masks.Mask | None, m: int
) -> Callable[[Array, Array], Array]:
  """Returns the mask as a function for the kernel, always the same object."""
  if not isinstance(mask, masks.TeacherForcing):
    return lambda query, key: key < query

  def function(query, key):
    begin = query - 1
    own = (key >= begin) & (key < begin + mask.block) & (key < m)
    past = key < jnp.minimum(begin - mask.clean, mask.clean)
    clean = (query <= mask.clean) & (key < query)
    # Selecting between two masks does not compile for TPUs.
    return clean | ((query > mask.clean) & (own | past))

  return function


def _fit(tokens: int, *most: int) -> tuple[int, tuple[int, ...]]:
  """Returns the number of tokens with padding, and the sizes of the blocks.

  Args:
    tokens: number of tokens without padding.
    *most: largest sizes of blocks, each a divisor of the one before.

  Returns:
    A padded number of tokens, and block sizes of at most `most`. Each size
    divides the number and the size before it, and the largest blocks are filled
    about evenly.
  """
  count = -(-tokens // most[0])
  tokens = -(-tokens // count)
  if tokens <= most[-1]:
    block = -(-tokens // LANES) * LANES
    return count * block, (block,) * len(most)
  unit = LANES * most[0] // most[-1]
  block = -(-tokens // unit) * unit
  return count * block, tuple(block * size // most[0] for size in most)
