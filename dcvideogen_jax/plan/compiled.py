"""Programs compiled for a device that is not there, and what they take."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import convert
from dcvideogen_jax.models import streaming
from dcvideogen_jax.plan import flops
from dcvideogen_jax.sample import loading

# Figures of one program, by name; bytes but for "flops".
Figures = dict[str, int]


def part(kind: str, variant: str, **overrides: Any) -> loading.Part:
  """A released model whose variables are shapes.

  Args:
    kind: a key of `convert.KINDS`.
    variant: one of its variants.
    **overrides: fields that differ, such as dtypes.
  """
  known = convert.KINDS[kind]
  module = known.build(known.variants[variant], **overrides)
  return loading.Part(
    module,
    jax.eval_shape(module.init, jax.random.key(0), *known.example(module)),
  )


def place(device: jax.Device, tree: Any) -> Any:
  """The shapes of a tree of arrays or shapes, as if they lay on a device."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def size(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes."""
  return sum(
    x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
  )


def figures(traced: Any, arguments: Any) -> Figures:
  """Compiles a program and says what it takes.

  Args:
    traced: what `jax.jit(f).trace(...)` gives for shapes that were placed.
    arguments: those that count. Weights do not: a program takes those that it
      uses, and all of them stay.

  Returns:
    "flops" and, in bytes, "arguments", "outputs", "temporaries" and "aliased",
    outputs that take the place of arguments.
  """
  memory = traced.lower().compile().memory_analysis()
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
  device: jax.Device,
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
    device: to compile for.
    x, *args: shapes of its arguments.
    collections: of the state that it takes and returns.
    dtype, **static: as `streaming.apply` takes them.

  Returns:
    Figures, with the bytes of the state's collections as further ones, and the
    shapes of the output.
  """
  variables, x, args = place(device, (variables, x, args))
  shapes = jax.eval_shape(
    functools.partial(
      streaming.empty_state, module, method, collections=collections, **static
    ),
    variables,
    x,
    *args,
  )
  state = place(device, shapes)
  traced = streaming.apply.trace(
    module, method, variables, x, *args, state=state, dtype=dtype, **static
  )
  found = figures(traced, (x, args, state))
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
