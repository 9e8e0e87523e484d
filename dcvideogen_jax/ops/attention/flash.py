"""Flash attention (arXiv 2307.08691) in Pallas, for GPUs through Triton.

jax 0.12 announces that a later version will remove Triton from Pallas. Unless
it has been ported to Mosaic GPU by then, this kernel will be removed too. It is
used only if it is named; by default, masked attention on GPUs is `by_chunks`
over cuDNN, which does not depend on Triton.

In the forward pass, a program of the grid computes one tile of queries of one
head. It loops over the tiles of keys that any of these queries sees, and never
reads the other tiles. The backward pass has two kernels: one loops over tiles
of keys for the gradient of the queries, one loops over tiles of queries for the
gradients of keys and values. Beside inputs and output, only the logarithm of
the sum of exponentials is saved for it. The tiles of each loop are computed
from the mask before the program is compiled (`tile_ranges`).

Softmax and sums are computed in float32, with exponentials of base two. Matrix
products take factors of the inputs' dtype.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import flash_kernels as kernels
from dcvideogen_jax.ops.attention import masks, tile_ranges

WIDTHS = (16, 32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
# Inputs and outputs whose tokens are keys; those of the others are queries.
_OF_KEYS = ("k", "v")


class Tile(NamedTuple):
  """The tile of a kernel; all numbers except the stages are powers of two.

  Attributes:
    queries, keys: tokens of a tile, at least 16.
    warps: warps of 32 threads that run one program.
    stages: tiles in flight, including the one in use.
  """

  queries: int
  keys: int
  warps: int
  stages: int


class Tiles(NamedTuple):
  """The `Tile` of each kernel in `flash_kernels`."""

  forward: Tile
  of_queries: Tile
  of_keys: Tile


# (prefix of the device kind, largest head width) -> tiles. Those for Hopper are
# the largest with which kernels compiled for an H100 spill no registers, except
# for 8 bytes in float16. No tiles have been timed on hardware.
TILES: Mapping[tuple[str, int], Tiles] = {
  ("NVIDIA H", 64): Tiles(
    Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)
  ),
  ("NVIDIA H", 128): Tiles(
    Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)
  ),
}
# Tiles for float32 and for other devices.
_OTHER = Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))


def tiles(kind: str, e: int, dtype: Any) -> Tiles:
  """Returns the tiles for a kind of device.

  Args:
    kind: `device_kind` of the device; an unknown kind gets small tiles.
    e: width of a head.
    dtype: dtype of the inputs; float32 gets small tiles.
  """
  if jnp.dtype(dtype).itemsize == 2:
    for (name, width), found in TILES.items():
      if kind.startswith(name) and e <= width:
        return found
  return _OTHER


def flash(
  q: Float[Array, "b n k e"],
  k: Float[Array, "b m k e"],
  v: Float[Array, "b m k e"],
  mask: masks.Mask | None = None,
  *,
  tiles: Tiles,
  interpret: bool = False,
) -> Float[Array, "b n k e"]:
  """Computes `reference` with the kernels, which compile for GPUs only.

  Args:
    q: queries of `n` tokens, `k` heads of width `e`.
    k: keys of `m` tokens.
    v: values of `m` tokens.
    mask: which keys a query sees; None for all.
    tiles: tiles of the kernels, such as a row of `TILES`.
    interpret: whether to interpret the kernels, slowly and on any device.

  Raises:
    NotImplementedError: if the dtypes differ or are not among `DTYPES`, or if
      the width of the heads is not among `WIDTHS`.
    ValueError: if the mask does not fit the numbers of tokens.
  """
  dtypes = sorted({str(x.dtype) for x in (q, k, v)})
  if len(dtypes) > 1 or dtypes[0] not in DTYPES:
    raise NotImplementedError(
      f"pallas computes one of {', '.join(DTYPES)}, found {', '.join(dtypes)}"
    )
  if q.shape[-1] not in WIDTHS or v.shape[-1] != q.shape[-1]:
    raise NotImplementedError(
      f"pallas computes heads of {', '.join(map(str, WIDTHS))}, found "
      f"{q.shape[-1]}"
    )
  return _flash(q, k, v, _TilePlan(mask, tiles, interpret))


class _TilePlan(NamedTuple):
  mask: masks.Mask | None
  tiles: Tiles
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _flash(q, k, v, plan):
  return _forward(q, k, v, plan)[0]


def _forward(q, k, v, plan):
  b, n, heads, _ = q.shape
  numbers = jax.ShapeDtypeStruct((b, heads, n), jnp.float32)
  out, sums = _call(
    kernels.forward,
    plan,
    plan.tiles.forward,
    inputs={"q": q, "k": k, "v": v},
    outputs={"q": jax.ShapeDtypeStruct(q.shape, v.dtype), "sums": numbers},
    products=2,
  )
  return out, (q, k, v, out, sums)


def _backward(plan, saved, dout):
  q, k, v, out, sums = saved
  dots = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
  dots = dots.transpose(0, 2, 1)
  inputs = {"q": q, "k": k, "v": v, "dout": dout, "sums": sums, "dots": dots}
  (dq,) = _call(
    kernels.of_queries, plan, plan.tiles.of_queries, inputs, {"q": q}, 3
  )
  dk, dv = _call(
    kernels.of_keys,
    plan,
    plan.tiles.of_keys,
    inputs,
    {"k": k, "v": v},
    4,
    across=True,
  )
  return dq, dk, dv


_flash.defvjp(_forward, _backward)


def _call(
  kernel: Callable[..., None],
  plan: _TilePlan,
  tile: Tile,
  inputs: Mapping[str, Any],
  outputs: Mapping[str, Any],
  products: int,
  across: bool = False,
) -> list[Array]:
  """Runs a kernel for every tile of every head.

  Args:
    kernel: a kernel of `flash_kernels`.
    plan: mask, and whether to interpret the kernel.
    tile: tile of the kernel.
    inputs: arrays by name; the tokens of "k" and "v" are keys, the tokens of
      the others are queries.
    outputs: shapes and dtypes, by such names.
    products: matrix products per tile of queries and keys, for the estimate of
      the cost.
    across: whether the grid is over tiles of keys and the kernel loops over
      tiles of queries; by default it is the other way around.
  """
  (b, n, heads, _), m = inputs["q"].shape, inputs["k"].shape[1]
  runs = tile_ranges.tile_ranges(
    plan.mask, n, m, tile.queries, tile.keys, across
  )
  shape = kernels.Shape(plan.mask, n, m, tile.queries, tile.keys, runs.partial)
  sizes = (tile.queries, tile.keys)

  def spec(name, x):
    """Returns the block of `x`: a tile, or all tokens of the loop."""
    of_keys = name in _OF_KEYS
    size = sizes[of_keys] if of_keys == across else None
    return _tokens(x, size)

  table = pl.BlockSpec(
    (None, *runs.bounds.shape[1:]), lambda i, b, k: (i, 0, 0)
  )
  walked = [inputs[name] for name in inputs if (name in _OF_KEYS) != across]
  once = [inputs[name] for name in inputs if (name in _OF_KEYS) == across]
  read = runs.tiles * sizes[not across]
  pairs = runs.tiles * tile.queries * tile.keys * b * heads
  return pl.pallas_call(
    functools.partial(kernel, shape=shape),
    grid=(len(runs.bounds), b, heads),
    in_specs=[table, *(spec(name, x) for name, x in inputs.items())],
    out_specs=[spec(name, x) for name, x in outputs.items()],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()
    ],
    compiler_params=triton.CompilerParams(
      num_warps=tile.warps, num_stages=tile.stages
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * inputs["q"].shape[-1] * pairs,
      transcendentals=pairs,
      # Each program reads the tiles that it loops over once.
      bytes_accessed=_bytes(*once, *outputs.values())
      + _bytes(*walked) * read // (m if not across else n),
    ),
    interpret=plan.interpret,
    name=f"attention_{kernel.__name__}",
  )(jnp.asarray(runs.bounds), *inputs.values())


def _tokens(x: Any, size: int | None) -> pl.BlockSpec:
  """Returns the block of an array in a grid of tiles, samples and heads.

  Args:
    x: axes b n k e, or b k n for one number per token and head.
    size: tokens of a program's tile; None gives every program all tokens.
  """
  axis = 1 if x.ndim == 4 else 2
  shape = (None, size or x.shape[axis])

  def at(i):
    return 0 if size is None else i

  if axis == 2:
    return pl.BlockSpec((None, *shape), lambda i, b, k: (b, k, at(i)))
  return pl.BlockSpec(
    (*shape, None, x.shape[3]), lambda i, b, k: (b, at(i), k, 0)
  )


def _bytes(*arrays: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in arrays)
