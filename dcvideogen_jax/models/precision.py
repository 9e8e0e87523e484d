"""How exactly the encoders and autoencoders multiply in float32.

Left to itself JAX multiplies float32 numbers with the precision that a device
is fastest with: on a TPU in one pass of bfloat16, on a GPU in TF32. For these
models that is what half precision is, which shows in the videos. So each of
them says how exact float32 has to be, and everything that runs it (sampling,
training, encoding beforehand, evaluation) gets the same numbers.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Of the autoencoders' convolutions: three passes on a TPU, and TF32 on a GPU,
# as PyTorch has it.
CONVOLUTIONS = "high"
# Of CLIP's and UMT5's products: float32 on every device, as PyTorch has it.
PRODUCTS = "highest"


def of_float32(precision: str) -> Callable[[Callable[..., Any]], Any]:
  """Decorates a method of a module, which computes in the module's `dtype`.

  In float32 its products and convolutions have at least the precision, unless
  `jax_default_matmul_precision` is set: what was asked for comes first. In half
  precision nothing changes.

  Args:
    precision: as of `jax.default_matmul_precision`.
  """

  def decorate(method):
    @functools.wraps(method)
    def run(self, *args, **kwargs):
      if self.dtype != jnp.float32:
        return method(self, *args, **kwargs)
      with unless_set(precision):
        return method(self, *args, **kwargs)

    return run

  return decorate


def unless_set(precision: str) -> contextlib.AbstractContextManager[Any]:
  """`jax.default_matmul_precision`, where the user or a caller has set none."""
  if jax.config.jax_default_matmul_precision is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(precision)
