"""Errors of attention and of convolutions against their references."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import Case, Row, shape
from dcvideogen_jax.ops import attention, conv3d
from dcvideogen_jax.ops.attention import masks

# Largest error that rounding explains, over the largest value of the reference:
# some units of the dtype's last place. Float32 products on a GPU have factors
# of ten bits of mantissa (TF32).
BOUNDS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 4e-3}


class Kernel(NamedTuple):
  """An implementation of attention and the inputs it is tried on.

  Attributes:
    implementation: a key of `attention.IMPLEMENTATIONS`.
    dtype: of all inputs.
    width: of a head.
    queries, keys: numbers of tokens.
    mask: which keys a query sees; None for all.
  """

  implementation: str
  dtype: str
  width: int
  queries: int
  keys: int
  mask: masks.Mask | None = None

  @property
  def name(self) -> str:
    """The name of the kernel's row."""
    masked = f", {type(self.mask).__name__}" if self.mask else ""
    return (
      f"{self.implementation} {self.dtype}, {self.queries} queries, {self.keys}"
      f" keys, heads of {self.width}{masked}"
    )


_CAUSAL, _TEACHER = attention.BlockCausal(96), attention.TeacherForcing(96, 190)
# The odd numbers of tokens are those of CLIP and of odd chunks, which cuDNN is
# given as lengths; the masks have a smaller last block.
KERNELS = (
  Kernel("cudnn", "bfloat16", 128, 384, 512),
  Kernel("cudnn", "bfloat16", 128, 375, 257),
  Kernel("cudnn", "float16", 64, 375, 375),
  Kernel("by_chunks", "bfloat16", 128, 375, 375, attention.BlockCausal(125)),
  Kernel("by_chunks", "bfloat16", 128, 380, 380, _TEACHER),
  Kernel("pallas", "bfloat16", 128, 380, 380),
  Kernel("pallas", "bfloat16", 128, 380, 380, _CAUSAL),
  Kernel("pallas", "bfloat16", 128, 380, 380, _TEACHER),
  Kernel("pallas", "float16", 64, 380, 380, _CAUSAL),
  Kernel("pallas", "float32", 64, 380, 380, _CAUSAL),
  Kernel("chunked", "bfloat16", 128, 380, 380, _CAUSAL),
  Kernel("chunked", "float32", 64, 380, 257),
)


def supported(kernel: Kernel, platform: str) -> bool:
  """Whether an implementation computes such inputs on a platform at all."""
  return kernel.implementation != "cudnn" or platform == "gpu"


def attend(kernel: Kernel, implementation: str, *arrays: Any) -> Any:
  """Computes attention and the gradients of queries, keys and values.

  Args:
    kernel: gives the mask.
    implementation: a key of `attention.IMPLEMENTATIONS`.
    *arrays: queries, keys, values, and the gradient of the output.
  """

  def function(q, k, v):
    return attention.attention(
      q, k, v, mask=kernel.mask, implementation=implementation
    )

  out, pull = jax.vjp(function, *arrays[:3])
  return out, *pull(arrays[3])


def convolve(implementation: str | None, x: Any, kernel: Any, dy: Any) -> Any:
  """Computes a convolution and the gradients of its input and its kernel."""

  def function(x, kernel):
    return conv3d.conv3d(
      x, kernel, padding=((1, 1),) * 3, implementation=implementation
    )

  y, pull = jax.vjp(function, x, kernel)
  return y, *pull(dy)


def errors(kernel: Kernel) -> dict[str, float]:
  """Compares attention and its gradients with the reference.

  The reference has the same inputs and computes in float32 with exact products.

  Returns:
    The largest error over the largest value, by "output", "dq", "dk" and "dv".
  """
  arrays = _random(kernel.dtype, *shapes(kernel))
  run = jax.jit(functools.partial(attend, kernel), static_argnums=0)
  names = ("output", "dq", "dk", "dv")
  return _compare(names, run, kernel.implementation, arrays)


def shapes(kernel: Kernel) -> list[tuple[int, ...]]:
  """Returns the shapes of the arrays that `attend` takes."""
  sizes = (kernel.queries, kernel.keys, kernel.keys, kernel.queries)
  return [(1, n, 2, kernel.width) for n in sizes]


def conv3d_errors(dtype: str) -> dict[str, float]:
  """Compares the default convolution and its gradients with the reference."""
  x, kernel, dy = _random(
    dtype, (1, 5, 24, 24, 64), (3, 3, 3, 64, 64), (1, 5, 24, 24, 64)
  )
  run = jax.jit(convolve, static_argnums=0)
  return _compare(("output", "dx", "dkernel"), run, None, (x, kernel / 42, dy))


def _random(dtype: str, *sizes: tuple[int, ...]) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


def _compare(names, run, implementation, arrays) -> dict[str, float]:
  found = run(implementation, *arrays)
  with jax.default_matmul_precision("highest"):
    exact = run("reference", *(x.astype(jnp.float32) for x in arrays))
  return {
    name: _error(a, b) for name, a, b in zip(names, found, exact, strict=True)
  }


def _error(found: Any, exact: Any) -> float:
  a, b = (np.asarray(x, np.float64) for x in (found, exact))
  return float(np.abs(a - b).max() / np.abs(b).max())


def cases() -> Iterator[Case]:
  """The programs of `rows`, to compile for a GPU that is not there."""
  for kernel in KERNELS:
    function = functools.partial(attend, kernel, kernel.implementation)
    arrays = [shape(*x, dtype=kernel.dtype) for x in shapes(kernel)]
    yield Case(kernel.name, function, (*arrays,), kernel.dtype)


def rows(platform: str, few: bool = False) -> Iterator[Callable[[], Row]]:
  """Yields a function for the row of each kernel, and of convolutions.

  Args:
    platform: of the default device.
    few: whether to take the first kernel of each implementation only.
  """
  seen: set[str] = set()
  for kernel in KERNELS:
    if few and kernel.implementation in seen:
      continue
    if supported(kernel, platform):
      seen.add(kernel.implementation)
      yield lambda k=kernel: _row(k.name, k.dtype, errors(k))
  for dtype in ("bfloat16", "float32"):
    yield lambda d=dtype: _row(f"conv3d {d}", d, conv3d_errors(d))


def _row(name: str, dtype: str, found: dict[str, float]) -> Row:
  row: Row = {"case": name, **found, "bound": BOUNDS[dtype]}
  # A NaN is within no bound.
  if wrong := [k for k, x in found.items() if not x <= BOUNDS[dtype]]:
    row["failed"] = f"{', '.join(wrong)} above the bound"
  return row
