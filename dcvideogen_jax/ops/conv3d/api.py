"""The one entry point: choice of implementation, split, bias."""

from collections.abc import Sequence

import jax
from jax import lax
from jaxtyping import Array, Float

from dcvideogen_jax.ops.conv3d import decompositions, reference

IMPLEMENTATIONS = {
  "reference": reference.reference,
  "xla": reference.xla,
  "frames": decompositions.frames,
}

# cuDNN and many XLA kernels index with 32 bits.
MAX_ELEMENTS = 2**31 - 1

Padding = Sequence[tuple[int, int]]


def conv3d(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  padding: Padding,
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
  max_elements: int = MAX_ELEMENTS,
) -> Float[Array, "n T H W o"]:
  """Convolves with stride 1 and zero padding given per side."""
  if implementation is None:
    implementation = "frames" if jax.default_backend() == "cpu" else "xla"
  y = IMPLEMENTATIONS[implementation](x, kernel, tuple(padding), precision)
  y = y.astype(x.dtype)
  return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, 1, 1, -1)
