"""Precision of products: of float32 in encoders and autoencoders, of bfloat16.

By default JAX multiplies float32 numbers with the precision at which a device
is fastest: on a TPU in one pass of bfloat16, on a GPU in TF32. For these models
that amounts to half precision, and the difference is visible in the videos.
Each model therefore sets the precision of its own float32 products, so that
sampling, training, precomputed latents and evaluation get the same numbers.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.attention import api

# The autoencoders' convolutions: three passes of bfloat16 on a TPU, and TF32 on
# a GPU, which is PyTorch's default for convolutions.
CONVOLUTIONS = "high"
# The products of CLIP and UMT5: float32 on every device, which is PyTorch's
# default for matrix products.
PRODUCTS = "highest"


def of_float32(precision: str) -> Callable[[Callable[..., Any]], Any]:
  """Decorates a method of a module so that its float32 products are precise.

  If the module's `dtype` is float32, products and convolutions have at least
  `precision`, unless the user has set `jax_default_matmul_precision`. In half
  precision nothing changes.

  Args:
    precision: a value of `jax.default_matmul_precision`.
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
  """Returns a context that sets the precision unless a user or caller has."""
  if jax.config.jax_default_matmul_precision is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(precision)


def matmul(
  x: Array, kernel: Array, precision: jax.lax.PrecisionLike = None
) -> Array:
  """Computes x @ kernel in the dtype of `x`.

  On a CPU, XLA (seen with 0.10.2) converts both factors of a bfloat16 product
  to float32, unless its result is float32. Then it multiplies bfloat16, which
  takes a third of the time where the CPU has instructions for it. So there the
  result is rounded in a second step, to the same numbers up to the order of the
  sums. Other platforms round it within the product.

  Args:
    x: channels last.
    kernel: (in, out); converted to the dtype of `x`.
    precision: as in `jax.lax`.
  """
  rounds_after = x.dtype == jnp.bfloat16 and api.device().platform == "cpu"
  y = jnp.matmul(
    x,
    kernel.astype(x.dtype),
    precision=precision,
    preferred_element_type=jnp.float32 if rounds_after else None,
  )
  return y.astype(x.dtype)
