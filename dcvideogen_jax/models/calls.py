"""Compiled calls of a module's methods, with their state, for streaming.

The state of a method is in Flax collections: "cache" holds what a chunk leaves
for the next chunk, and "rows" what a band of rows leaves for the band below.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Num

from dcvideogen_jax import levels, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import layers

# Axis of the columns in the arrays of each collection of the state.
COLUMNS = {"cache": 3, "rows": 4}


@functools.partial(
  jax.jit,
  static_argnames=("module", "method", "dtype", "height", "cut", "rows"),
  donate_argnames=("state",),
)
def apply(
  module: nn.Module,
  method: str,
  variables: Mapping[str, Any],
  x: Num[Array, "b t h w c"],
  *args: Any,
  state: Mapping[str, Any],
  dtype: Any = None,
  **static: Any,
) -> tuple[Any, Mapping[str, Any]]:
  """Calls a method of a module; compiled, returns the result and new state.

  Args:
    module, method, variables: the model, the method's name, `{"params": ...}`.
    x, *args, **static: the method's arguments; uint8 pixels become floats.
    state: the mutable collections by name; donated.
    dtype: dtype of the result; None keeps the method's.
  """
  y, state = module.apply(
    {**variables, **state},
    levels.to_float(x),
    *args,
    **static,
    method=method,
    mutable=[*state],
  )
  y = jax.tree.map(layers.constrain_output, y)
  return (y if dtype is None else from_float(y, dtype)), state


def empty_state(
  module: nn.Module,
  method: str,
  variables: Mapping[str, Any],
  x: Num[Array, "b t h w c"],
  *args: Any,
  **static: Any,
) -> dict[str, Any]:
  """Returns the state of `apply` at the beginning of a clip: zeros.

  Args:
    module, method, variables, x, *args, **static: as for `state_shapes`.
  """
  shapes = state_shapes(module, method, variables, x, *args, **static)
  return {name: empty(shapes, name) for name in shapes}


def state_shapes(
  module: nn.Module,
  method: str,
  variables: Mapping[str, Any],
  x: Num[Array, "b t h w c"],
  *args: Any,
  collections: Sequence[str] = ("cache",),
  **static: Any,
) -> dict[str, Any]:
  """Traces a method and returns the shapes of its state by collection.

  Args:
    module, method, variables, x, *args, **static: as for `apply`.
    collections: names of the mutable collections.
  """

  def run(variables, x, *args):
    call = functools.partial(
      module.apply, **static, method=method, mutable=[*collections]
    )
    return call(variables, levels.to_float(x), *args)[1]

  shapes = jax.eval_shape(run, variables, x, *args)
  return {name: shapes.get(name, {}) for name in collections}


def empty(shapes: Mapping[str, Any], name: str) -> Any:
  """Returns zeros for the shapes of one collection, named in `COLUMNS`."""
  one = functools.partial(zeros, axis=COLUMNS[name])
  return jax.tree.map(one, shapes[name])


@functools.partial(jax.jit, static_argnames=("like", "axis"))
def zeros(like: jax.ShapeDtypeStruct, axis: int = 3) -> Array:
  """Returns zeros sharded like `apply`'s state, to compile `apply` once.

  `axis` is that of the columns.
  """
  x = jnp.zeros(like.shape, like.dtype)
  return jnp.moveaxis(
    layers.constrain_columns(jnp.moveaxis(x, axis, 3)), 3, axis
  )


def put(x: Num[Array, "b t h w c"]) -> Num[Array, "b t h w c"]:
  """Shards (b, t, h, w, c) over the mesh in force like `constrain_output`."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return x
  where = sharding.divisible_spec(mesh, x.shape, *layers.SPLIT)
  return jax.device_put(x, NamedSharding(mesh, where))


def from_float(x: Float[Array, "..."], dtype: Any) -> Num[Array, "..."]:
  """Converts pixels in [-1, 1] to uint8 levels, or to another float dtype."""
  return levels.to_uint8(x) if dtype == np.uint8 else x.astype(dtype)
