"""The rate of matrix products, beside which the rates of models are shown."""

import time
from collections.abc import Callable
from typing import Any

_SIZE = 2048
_RUNS = 5


def rate(side: str, dtype: str) -> float:
  """Measures products of two square matrices in this process.

  Args:
    side: "jax" or "torch", which multiplies.
    dtype: of the matrices and of the product.

  Returns:
    FLOPs per second of the fastest of five runs.
  """
  run = {"jax": _jax, "torch": _torch}[side](dtype)
  run()
  seconds = []
  for _ in range(_RUNS):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return 2 * _SIZE**3 / min(seconds)


def _jax(dtype: str) -> Callable[[], Any]:
  import jax

  from dcvideogen_jax.models import precision

  a, b = jax.random.normal(jax.random.key(0), (2, _SIZE, _SIZE)).astype(dtype)
  product = jax.jit(precision.matmul)
  return lambda: product(a, b).block_until_ready()


def _torch(dtype: str) -> Callable[[], Any]:
  import torch

  a, b = torch.randn(2, _SIZE, _SIZE).to(getattr(torch, dtype))
  return lambda: a @ b
