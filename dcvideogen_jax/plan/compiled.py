"""Compiles programs for devices that are not present, and measures them."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dcvideogen_jax import errors, flops, sharding
from dcvideogen_jax.models import calls

if TYPE_CHECKING:
  from dcvideogen_jax.sample import loading

# Figures of a program by name: "flops" is in FLOPs, all others are in bytes.
Figures = dict[str, int]
Options = Mapping[str, Any]

# XLA's lowest effort. By default XLA tries many tilings of each 3-D convolution
# for a TPU, which takes a CPU core 20 to 60 seconds per convolution. The size
# of temporaries differs by a thousandth at most.
QUICKLY: Options = {"exec_time_optimization_effort": -1.0}


class TooLarge(Exception):
  """A program or the weights cannot fit the device; the message says which."""


class Refused(errors.UserError):
  """jax or the compiler cannot compile a program; the message says why."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Turns any exception of jax and its compilers into one sentence.

  They raise a dozen types, from a kernel's `NotImplementedError` to XLA's own.
  The traceback is logged at level INFO.

  Raises:
    Refused: for any exception except those below.
    TooLarge, errors.UserError, MemoryError: if the body raises them.
  """
  try:
    yield
  except (TooLarge, errors.UserError, MemoryError):
    raise
  except Exception as e:
    logging.info("refused", exc_info=True)
    reason = next(iter(str(e).strip().splitlines()), "no reason given")
    raise Refused(f"cannot be compiled: {type(e).__name__}: {reason}") from e


def compile_traced(
  traced: jax.stages.Traced, options: Options | None = None
) -> jax.stages.Compiled:
  """Compiles a traced program for devices that need not be present.

  Args:
    traced: the program, traced for these devices.
    options: compiler options, such as `QUICKLY`.

  Raises:
    TooLarge: if the program does not fit into the device's memory.
  """
  try:
    return traced.lower().compile(compiler_options=dict(options or {}))
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    # The further lines list the largest allocations.
    reason = str(e).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
    raise TooLarge(reason) from e


def part(kind: str, variant: str, **overrides: Any) -> "loading.LoadedModel":
  """Builds a released model with shapes in place of variables.

  Args:
    kind: a key of `convert.KINDS`.
    variant: one of its variants.
    **overrides: fields of the module that differ, such as dtypes.
  """
  # What reads files; the rest of this module needs jax alone.
  from dcvideogen_jax import convert
  from dcvideogen_jax.sample import loading

  known = convert.KINDS[kind]
  module = known.build(known.variants[variant], **overrides)
  return loading.LoadedModel(module, known.init(module))


def place(mesh: Mesh, tree: Any, columns: int | None = None) -> Any:
  """Returns the shapes of a tree, with shardings on a mesh.

  Args:
    mesh: its devices need not be present.
    tree: arrays or shapes.
    columns: the dimension that holds columns of pictures. It is sharded if the
      devices divide it; everything else is replicated. None replicates all.
  """

  def one(x):
    names = ["columns" if i == columns else None for i in range(x.ndim)]
    where = NamedSharding(mesh, sharding.divisible_spec(mesh, x.shape, *names))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(one, tree)


def size(tree: Any) -> int:
  """Returns the bytes per device of a tree of arrays or shapes."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def figures(
  traced: jax.stages.Traced, arguments: Any, options: Options | None = None
) -> Figures:
  """Compiles a program and returns its FLOPs and memory.

  Args:
    traced: result of `jax.jit(f).trace(...)` for shapes of `place`.
    arguments: the arguments to count. Weights are left out, as they stay on the
      device anyway and are counted elsewhere.
    options: as for `compile_traced`.

  Returns:
    "flops" of all devices and, in bytes per device, "arguments", "outputs",
    "temporaries" and "aliased", the outputs that reuse the memory of arguments.
  """
  return of(traced, compile_traced(traced, options), arguments)


def of(
  traced: jax.stages.Traced, program: jax.stages.Compiled, arguments: Any
) -> Figures:
  """Returns `figures` of a compiled program.

  Args:
    traced: the program before it was compiled.
    program: the compiled program.
    arguments: the arguments to count, as for `figures`.
  """
  memory = program.memory_analysis()
  return {
    "flops": flops.count(traced.jaxpr.jaxpr),
    "arguments": size(arguments),
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
  }


def streamed(
  module: Any,
  variables: Any,
  mesh: Mesh,
  method: str,
  x: Any,
  *args: Any,
  collections: Sequence[str] = ("cache",),
  dtype: Any = None,
  **static: Any,
) -> tuple[Figures, Any]:
  """Compiles one call of `calls.apply`.

  Args:
    module: the model.
    variables: the shapes of its variables.
    mesh: its devices are compiled for; they share the columns.
    method: the name of the method to call.
    x, *args: shapes of its arguments.
    collections: Flax collections of the state that the call takes and returns.
    dtype: as for `calls.apply`.
    **static: further arguments of `calls.apply`.

  Returns:
    The program's figures, with the bytes of each collection of the state under
    its name, and the shape of the output.
  """
  variables, args = place(mesh, (variables, args))
  x = place(mesh, x, columns=3)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(
      functools.partial(
        calls.empty_state, module, method, collections=collections, **static
      ),
      variables,
      x,
      *args,
    )
    state = {
      name: place(mesh, shapes[name], calls.COLUMNS[name])
      for name in collections
    }
    traced = calls.apply.trace(
      module, method, variables, x, *args, state=state, dtype=dtype, **static
    )
  on_tpus = mesh.devices.flat[0].platform == "tpu"
  found = figures(traced, (x, args, state), QUICKLY if on_tpus else None)
  found |= {name: size(state[name]) for name in collections}
  return found, traced.out_info[0]


def report(
  programs: Mapping[str, tuple[int, Figures]],
  waiting: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """Combines the figures of programs that run one after another.

  Args:
    programs: number of runs and figures of each program, by its name.
    waiting: bytes that stay on the device while a program runs that does not
      use them, by the program's name.

  Returns:
    "programs": by name, "runs", the figures, "waiting" and the sum "bytes";
    "bytes": the maximum over all programs; "flops": the sum over all runs.
  """
  table = {}
  for name, (runs, found) in programs.items():
    idle = (waiting or {}).get(name, 0)
    used = found["arguments"] + found["outputs"] + found["temporaries"]
    used += idle - found["aliased"]
    table[name] = {"runs": runs, **found, "waiting": idle, "bytes": used}
  return {
    "bytes": max(row["bytes"] for row in table.values()),
    "flops": sum(row["runs"] * row["flops"] for row in table.values()),
    "programs": table,
  }
