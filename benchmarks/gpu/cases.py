"""Compiles a program for a device, there or not, and times it where it is."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dcvideogen_jax import flops, memory, sharding, tree

Row = dict[str, Any]

# A case is timed for about this long, with a number of calls in these bounds.
_SECONDS, _CALLS = 1.5, (3, 20)


class Case(NamedTuple):
  """A program to compile and to time.

  Attributes:
    name: of its row.
    function: the program; it is compiled as a whole.
    shapes: a tree of shapes and dtypes for each argument.
    dtype: of the matrix products, for the peak rate: "bfloat16" or "float32".
    useful: FLOPs that count as work; None counts those of the program.
    moved: bytes that count as moved; 0 reports no bandwidth.
    feeds: whether the first result is the first argument of the next call, as
      the state of a training is; the argument is donated.
  """

  name: str
  function: Callable[..., Any]
  shapes: tuple[Any, ...]
  dtype: str = "bfloat16"
  useful: int | None = None
  moved: int = 0
  feeds: bool = False


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an argument."""
  return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def measure(case: Case, device: jax.Device, run: bool) -> Row:
  """Compiles a program and, where the device is there, times it.

  Args:
    case: the program.
    device: what it is compiled for, which need not be there.
    run: whether it is there.

  Returns:
    "case"; "compile s"; "planned GiB", what the compiler plans for arguments,
    results and temporaries. If it ran, also "ms", the median of several calls
    after one that is not counted; "TFLOP/s" or "GB/s"; "of peak", the share of
    the data sheet's rate, where that is known; "peak GiB", the most that this
    process has held so far; and "finite", whether all results were finite.
  """
  where = NamedSharding(sharding.make_mesh({}, [device]), PartitionSpec())
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    case.shapes,
  )
  donated = (0,) if case.feeds else ()
  start = time.perf_counter()
  with jax.set_mesh(where.mesh):
    traced = jax.jit(case.function, donate_argnums=donated).trace(*shapes)
    program = traced.lower().compile()
  row: Row = {"case": case.name, "compile s": time.perf_counter() - start}
  if (plan := program.memory_analysis()) is not None:
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes
    held += plan.temp_size_in_bytes - plan.alias_size_in_bytes
    row["planned GiB"] = held / 2**30
  if not run:
    return row
  work = case.useful
  if work is None:
    work = flops.count(traced.jaxpr.jaxpr)
  seconds, finite = timed(program, draw(shapes), case.feeds)
  row["ms"] = 1e3 * seconds
  row |= rates(work, case.moved, seconds, case.dtype, device)
  if (peak := memory.peak_device()) is not None:
    row["peak GiB"] = peak / 2**30
  return row | {"finite": finite}


def rates(
  work: int, moved: int, seconds: float, dtype: str, device: jax.Device
) -> Row:
  """Returns the rates of some work, and their share of the device's peak."""
  row: Row = {}
  if moved:
    row["GB/s"] = moved / seconds / 1e9
  if work:
    row["TFLOP/s"] = work / seconds / 1e12
    if peak := flops.peak([device], dtype):
      row["of peak"] = work / seconds / peak
  return row


def timed(
  function: Callable[..., Any], arguments: tuple[Any, ...], feeds: bool = False
) -> tuple[float, bool]:
  """Calls a compiled program until its median is known.

  Args:
    function: the program.
    arguments: its arguments.
    feeds: as in `Case`.

  Returns:
    The median of the seconds, and whether all results were finite.
  """
  seconds: list[float] = []
  finite, calls = True, 2
  while len(seconds) < calls:
    start = time.perf_counter()
    results = jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - start)
    if len(seconds) == 1:
      finite = _finite(results)
    elif len(seconds) == 2:  # The first call also loads the program.
      calls = 1 + int(np.clip(_SECONDS / seconds[1], *_CALLS))
    if feeds:
      arguments = (results[0], *arguments[1:])
  return statistics.median(seconds[1:]), finite


def _finite(results: Any) -> bool:
  floats = [
    x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return all(bool(jnp.isfinite(x).all()) for x in floats)


def draw(shapes: Any, seed: int = 0) -> Any:
  """Returns random arrays for a tree of shapes, made on their devices.

  Kernels keep the variance of their inputs, norms scale by 1, and the scales of
  kernels in eight bits make up for the size of the stored numbers. The state of
  an optimiser ("opt") and integers are zero.
  """
  leaves = tree.flatten({"": shapes})

  def one(key: jax.Array, name: str, x: Any) -> jax.Array:
    inputs = math.prod(x.shape[-2:-1]) if len(x.shape) > 1 else 1
    stored = leaves.get(name.removesuffix("scale") + "kernel")
    if x.dtype == jnp.int8:
      return jax.random.randint(key, x.shape, -127, 128, x.dtype)
    # The state of an optimiser holds mean squares too.
    if jnp.issubdtype(x.dtype, jnp.integer) or "/opt/" in name:
      return jnp.zeros(x.shape, x.dtype)
    if name.endswith("/scale") and stored is None:
      return jnp.ones(x.shape, x.dtype)
    if name.endswith("/scale"):
      return jnp.full(x.shape, stored.shape[-2] ** -0.5 / 73, x.dtype)
    if not name.endswith(("/kernel", "/a", "/b", "/bias")):
      inputs = 1
    # Drawn in its own dtype, so that no copy in float32 is ever held.
    return jax.random.normal(key, x.shape, x.dtype) * x.dtype.type(inputs**-0.5)

  def all_of_them(key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, len(leaves)))
    made = {name: one(next(keys), name, x) for name, x in leaves.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [*made.values()])

  out = jax.tree.map(lambda x: x.sharding, shapes)
  made = jax.jit(all_of_them, out_shardings=out)(jax.random.key(seed))
  return jax.block_until_ready(made)
