"""Random weights of small models, made without running an initialiser.

Outside `jax.jit`, `module.init` runs the whole model operation by operation and
compiles a program for each: more than a hundred for an autoencoder.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of(module: Any, *inputs: Any, **options: Any) -> Any:
  """Returns random variables of a module.

  Args:
    module: a Linen module.
    *inputs: arguments of its `__call__`, or their shapes and dtypes.
    **options: as for `like`.
  """
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return like(shapes, **options)


def like(
  shapes: Any,
  seed: int = 1,
  vectors: float = 0.2,
  norms: float = 0.0,
  scale: float | None = None,
) -> Any:
  """Returns random arrays for a tree of shapes and dtypes.

  Kernels are scaled by their number of inputs, so that activations keep their
  size.

  Args:
    shapes: a tree of `jax.ShapeDtypeStruct`.
    seed: seed of all arrays together.
    vectors: standard deviation of arrays with one axis, such as biases.
    norms: mean of the scales of norms.
    scale: standard deviation of every array, in place of the above.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    deviation = scale
    if deviation is None:
      inputs = max(1, int(np.prod(leaf.shape[:-1])))
      deviation = inputs**-0.5 if len(leaf.shape) > 1 else vectors
    mean = norms if getattr(path[-1], "key", None) == "scale" else 0.0
    x = mean + deviation * rng.normal(size=leaf.shape)
    return jnp.asarray(x.astype(leaf.dtype))

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def jitted(module: Any, method: str = "__call__", **options: Any) -> Any:
  """Returns a compiled method of a module, the same for the same arguments.

  `jax.jit` finds its programs by the function: a new `functools.partial` is
  compiled again.

  Args:
    module: a Linen module.
    method: name of its method.
    **options: further arguments of `module.apply`, such as `mutable`.
  """
  return jax.jit(functools.partial(module.apply, method=method, **options))
