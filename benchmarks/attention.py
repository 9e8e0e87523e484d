"""Times implementations of attention, dense and block-causal, on a device."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tables
from dcvideogen_jax.ops import attention
from dcvideogen_jax.ops.attention import masks

# Implementations to time by platform; kernels that would be interpreted are
# left out.
NAMES = {
  "cpu": ("reference", "chunked", "by_chunks"),
  "gpu": ("cudnn", "by_chunks", "pallas", "chunked"),
  "tpu": ("splash", "by_chunks", "chunked"),
}
# Tokens, heads, head width and dtype. Accelerators get a layer of Wan 14B for
# 80 frames of 704x1280 pixels, encoded by f32t4c32.
SHAPES = {
  "cpu": (2048, 2, 64, "float32"),
  "gpu": (17600, 40, 128, "bfloat16"),
  "tpu": (17600, 40, 128, "bfloat16"),
}
# Numbers of blocks of the block-causal masks; 1 is dense attention.
BLOCKS = (1, 2, 20)
# Matrix products in the forward pass (False) and in forward and backward pass
# together (True). Each takes visible pairs * head width multiply-adds per head.
_PRODUCTS = {False: 2, True: 7}


def measure(
  shape: tuple[int, int, int, str],
  blocks: int,
  backward: bool,
  names: Sequence[str],
  repeats: int,
) -> dict[str, Any]:
  """Times attention of one sample in every implementation, in turns.

  Args:
    shape: tokens, heads, head width and dtype.
    blocks: number of blocks of a block-causal mask; 1 is dense attention.
    backward: also compute the gradients of queries, keys and values.
    names: implementations to time; one that does not support the case is left
      out.
    repeats: timed calls of each implementation after one that is not counted;
      the median is taken.

  Returns:
    "shape", "blocks" and "backward" as given; "ms", milliseconds by
    implementation; "tflops", 1e12 FLOPs per second by implementation, where
    only pairs of tokens that the mask leaves visible count.
  """
  tokens, heads, width, dtype = shape
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [
    jax.random.normal(key, (1, tokens, heads, width), jnp.dtype(dtype))
    for key in keys
  ]
  mask = attention.BlockCausal(-(-tokens // blocks)) if blocks > 1 else None
  compiled = {}
  for name in names:
    function = functools.partial(_run, name, mask, backward)
    try:
      compiled[name] = jax.jit(function).lower(*arrays).compile()
    except NotImplementedError:
      continue
  seconds = _time(compiled, arrays, repeats)
  work = 2 * _PRODUCTS[backward] * masks.area(mask, tokens, tokens)
  return {
    "shape": [*shape],
    "blocks": blocks,
    "backward": backward,
    "ms": {name: _round(1e3 * s) for name, s in seconds.items()},
    "tflops": {
      name: _round(work * heads * width / s / 1e12)
      for name, s in seconds.items()
    },
  }


def _run(name, mask, backward, q, k, v, dout):
  def attend(q, k, v):
    return attention.attention(q, k, v, mask=mask, implementation=name)

  return jax.vjp(attend, q, k, v)[1](dout) if backward else attend(q, k, v)


def _time(
  compiled: dict[str, Callable[..., Any]], arrays: Any, repeats: int
) -> dict[str, float]:
  found: dict[str, list[float]] = {name: [] for name in compiled}
  for repeat in range(repeats + 1):
    for name, function in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(function(*arrays))
      if repeat:
        found[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in found.items()}


def _round(x: float) -> float:
  return float(f"{x:.3g}")


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats milliseconds and TFLOP/s of measurements with the same shape."""
  names = [*dict.fromkeys(name for row in rows for name in row["ms"])]
  return tables.markdown(
    [
      {
        "blocks": row["blocks"],
        "pass": "both" if row["backward"] else "forward",
        **{
          name: f"{row['ms'][name]:.4g} ms {row['tflops'][name]:.4g}"
          if name in row["ms"]
          else "-"
          for name in names
        },
      }
      for row in rows
    ]
  )
