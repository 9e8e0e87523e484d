"""A convolution over blocks is the strided one, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcvideogen_jax.models import discriminator

# Even and odd sizes, which are padded to whole blocks.
SIZES = [(4, 8, 6), (5, 7, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_blocks_compute_the_strided_convolution(size, strides, kernel):
  rng = np.random.default_rng(0)
  x, kernel = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((2, *size, 3), (kernel, kernel, kernel, 3, 4))
  )

  def computed(form):
    def run(x, kernel):
      y, back = jax.vjp(lambda x, k: form(x, k, strides), x, kernel)
      return y, *back(jnp.sin(y))

    return jax.jit(run)(x, kernel)

  strided = computed(discriminator._strided)
  in_blocks = computed(discriminator._in_blocks)
  for a, b in zip(strided, in_blocks, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(a).max())
