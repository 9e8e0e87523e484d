"""Programs compiled for a device that is not there, and what they take."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dcvideogen_jax import convert, errors, flops, sharding
from dcvideogen_jax.models import streaming
from dcvideogen_jax.sample import loading

# Figures of one program, by name; bytes but for "flops".
Figures = dict[str, int]
Options = Mapping[str, Any]

# With the least effort that the compiler can make. For TPUs it tries many
# tilings of each 3-D convolution otherwise, which takes a core 20 to 60 seconds
# for each; temporaries are the same to a thousandth.
QUICKLY: Options = {"exec_time_optimization_effort": -1.0}


class TooLarge(Exception):
  """Something cannot fit, whatever the plan; the message says what."""


class Refused(errors.UserError):
  """jax or the compiler cannot make a program; the message says why."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Makes one sentence of whatever jax and its compilers raise.

  They raise a dozen types, from `NotImplementedError` of a kernel to XLA's own.
  The traceback is logged at the level of information.

  Raises:
    Refused: for any exception but those below.
    TooLarge, errors.UserError, MemoryError: as they come.
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
  """Compiles what was traced for devices that need not exist.

  Args:
    traced: for any devices.
    options: of the compiler, such as `QUICKLY`.

  Raises:
    TooLarge: if the compiler finds no room for it.
  """
  try:
    return traced.lower().compile(compiler_options=dict(options or {}))
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    # Further lines list the largest allocations.
    reason = str(e).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
    raise TooLarge(reason) from e


def part(kind: str, variant: str, **overrides: Any) -> loading.LoadedModel:
  """A released model whose variables are shapes.

  Args:
    kind: a key of `convert.KINDS`.
    variant: one of its variants.
    **overrides: fields that differ, such as dtypes.
  """
  known = convert.KINDS[kind]
  module = known.build(known.variants[variant], **overrides)
  return loading.LoadedModel(
    module,
    jax.eval_shape(module.init, jax.random.key(0), *known.example(module)),
  )


def place(mesh: Mesh, tree: Any, columns: int | None = None) -> Any:
  """The shapes of a tree of arrays or shapes, as if they lay on a mesh.

  Args:
    mesh: its devices need not exist.
    tree: arrays or shapes.
    columns: an axis of pictures' columns, which devices share where they divide
      it; None has all of it on every device.
  """

  def one(x):
    names = ["columns" if i == columns else None for i in range(x.ndim)]
    where = NamedSharding(mesh, sharding.divisible_spec(mesh, x.shape, *names))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(one, tree)


def size(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes, on one device of those it lies on."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def figures(
  traced: jax.stages.Traced, arguments: Any, options: Options | None = None
) -> Figures:
  """Compiles a program and says what it takes.

  Args:
    traced: what `jax.jit(f).trace(...)` gives for shapes that were placed.
    arguments: those that count. Weights do not: a program takes those that it
      uses, and all of them stay.
    options: as for `compile_traced`.

  Returns:
    "flops" of all devices and, in bytes of one device, "arguments", "outputs",
    "temporaries" and "aliased", outputs that take the place of arguments.
  """
  return of(traced, compile_traced(traced, options), arguments)


def of(
  traced: jax.stages.Traced, program: jax.stages.Compiled, arguments: Any
) -> Figures:
  """`figures` of a program that was compiled."""
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
  """Compiles one call of `streaming.apply`.

  Args:
    module, variables, method: what is called; the variables are shapes.
    mesh: to compile for.
    x, *args: shapes of its arguments.
    collections: of the state that it takes and returns.
    dtype, **static: as `streaming.apply` takes them.

  Returns:
    Figures, with the bytes of the state's collections as further ones, and the
    shapes of the output.
  """
  variables, args = place(mesh, (variables, args))
  x = place(mesh, x, columns=3)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(
      functools.partial(
        streaming.empty_state, module, method, collections=collections, **static
      ),
      variables,
      x,
      *args,
    )
    state = {
      name: place(mesh, shapes[name], streaming.COLUMNS[name])
      for name in collections
    }
    traced = streaming.apply.trace(
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
  """Puts programs that run one after another together.

  Args:
    programs: by name, how often one runs and its figures.
    waiting: bytes on the device that a program has nothing to do with.

  Returns:
    "programs", by name: runs, figures, "waiting" and "bytes", the sum;
    "bytes": the most of all programs; "flops": of all runs.
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
