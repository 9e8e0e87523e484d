"""`conv3d`: chooses an implementation, and cuts large arrays into bands."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.ops.conv3d import (
  decompositions,
  measured,
  reference,
  winograd,
)

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
  "reference": reference.reference,
  "xla": reference.xla,
  "channels": decompositions.fold_taps_into_input,
  "outputs": decompositions.fold_taps_into_output,
  "winograd": winograd.winograd,
}
REFUSALS = {"winograd": winograd.refusals}

# Decomposition -> the decomposition that computes the gradient of its input.
TRANSPOSE = {
  "channels": "outputs",
  "outputs": "channels",
  "winograd": "winograd",
}

# Largest number of elements in an array that cuDNN can index.
MAX_ELEMENTS = 2**31 - 1


def conv3d(
  x: Float[Array, "n t h w c"],
  kernel: Float[Array, "kt kh kw c o"],
  bias: Float[Array, " o"] | None = None,
  *,
  padding: Sequence[tuple[int, int]],
  implementation: str | None = None,
  precision: lax.PrecisionLike = None,
  max_elements: int = MAX_ELEMENTS,
) -> Float[Array, "n t2 h2 w2 o"]:
  """Convolves with stride 1 and zero padding.

  Args:
    x: float32 or bfloat16; products of bfloat16 are summed in float32.
    kernel: in the dtype of `x`.
    bias: added at every position; None for none.
    padding: zeros before and after, for t, h and w.
    implementation: a key of `IMPLEMENTATIONS`; None takes the result of
      `choose` for the platform that the program is lowered for. Implementations
      other than "reference" and "xla" have reverse-mode gradients only.
    precision: precision of the products, as in `jax.lax`.
    max_elements: if the input or the result has more elements, the convolution
      is computed in bands of rows with halos, which is exact.

  Returns:
    The result in the dtype of `x`.

  Raises:
    ValueError: if the shapes do not fit or the implementation is unknown.
    NotImplementedError: if the named implementation does not support the
      kernel, or one row has more than `max_elements`; the message gives every
      reason.
  """
  edges = tuple((int(low), int(high)) for low, high in padding)
  size = _size(x.shape, kernel.shape, edges)
  if implementation is None:
    forms = _choices(x.shape, kernel.shape, edges)
  elif implementation in IMPLEMENTATIONS:
    forms = {"default": implementation}
  else:
    raise ValueError(
      f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, "
      f"found {implementation!r}"
    )
  reasons = _refusals(implementation, kernel.shape)
  rows = _rows_per_band(x.shape, kernel.shape, edges, size, max_elements)
  if rows < 1:
    reasons.append(f"one row has more than {max_elements} elements")
  if reasons:
    raise NotImplementedError(f"conv3d: {'; '.join(reasons)}")

  bands = [
    _convolve(band, kernel, (edges[0], sides, edges[2]), forms, precision)
    for band, sides in _bands(x, kernel.shape[1], edges[1], size[1], rows)
  ]
  y = bands[0] if len(bands) == 1 else jnp.concatenate(bands, axis=2)
  if bias is None:
    return y
  return y + bias.astype(y.dtype).reshape(1, 1, 1, 1, -1)


def choose(
  x: Sequence[int],
  kernel: Sequence[int],
  padding: Sequence[tuple[int, int]],
  platform: str,
) -> str:
  """Returns the implementation that `conv3d` takes by default.

  Args:
    x, kernel: shapes of the input and of the kernel.
    padding: as for `conv3d`.
    platform: "cpu", "gpu" or "tpu".

  Returns:
    The implementation that was measured to be the fastest for the nearest shape
    (measured.json), among those that support the kernel.
  """
  size = _size(x, kernel, padding)
  names = measured.ranking(platform, (x[0], *size, x[-1], kernel[-1]))
  return next(name for name in names if not _refusals(name, kernel))


def _choices(x, kernel, padding):
  """Returns platform -> implementation; lowering decides the platform."""
  names = {
    platform: choose(x, kernel, padding, platform)
    for platform in measured.table()
  }
  forms = {platform: name for platform, name in names.items() if name != "xla"}
  return {**forms, "default": "xla"}


def _refusals(name, kernel):
  return REFUSALS[name](kernel) if name in REFUSALS else []


def _size(x, kernel, padding):
  """Returns the result's t, h and w."""
  if len(x) != 5 or len(kernel) != 5 or x[-1] != kernel[3]:
    raise ValueError(
      f"x must be n t h w c and kernel kt kh kw c o with the same c, "
      f"found {tuple(x)} and {tuple(kernel)}"
    )
  if len(padding) != 3:
    raise ValueError(f"padding must be three pairs, found {padding}")
  sides = zip(x[1:4], kernel[:3], padding, strict=True)
  size = tuple(s + sum(edge) - k + 1 for s, k, edge in sides)
  if min(size) < 1:
    raise ValueError(
      f"x {tuple(x)} padded by {padding} is smaller than kernel {tuple(kernel)}"
    )
  return size


def _rows_per_band(x, kernel, padding, size, max_elements):
  """Returns the most rows per band with no array above `max_elements`."""
  n, t, _, w, c = x
  row = n * (t + sum(padding[0])) * (w + sum(padding[2])) * c
  result_row = n * size[0] * size[2] * kernel[-1]
  halo = kernel[1] - 1
  return min(size[1], max_elements // row - halo, max_elements // result_row)


def _bands(x, taps, padding, height, rows):
  """Yields the input rows of each band, and the padding they still need."""
  for start in range(0, height, rows):
    low = start - padding[0]
    high = min(start + rows, height) - 1 + taps - padding[0]
    inside = slice(max(low, 0), max(min(high, x.shape[2]), 0))
    yield x[:, :, inside], (max(-low, 0), max(high - x.shape[2], 0))


def _convolve(x, kernel, padding, forms, precision) -> Array:
  if not set(forms.values()) & set(TRANSPOSE):
    return IMPLEMENTATIONS[forms["default"]](x, kernel, padding, precision)
  forms = tuple(sorted(forms.items()))
  return _decomposed(x, kernel, padding, forms, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _decomposed(x, kernel, padding, forms, precision) -> Array:
  """Convolves, with gradients that are as fast as the forward pass.

  The gradients of autodiff would be slower. `forms` are pairs of a platform and
  an implementation.
  """

  def run(name):
    return lambda x, kernel: IMPLEMENTATIONS[name](
      x, kernel, padding, precision
    )

  return _by_platform({p: run(name) for p, name in forms}, x, kernel)


def _decomposed_forward(x, kernel, padding, forms, precision):
  return _decomposed(x, kernel, padding, forms, precision), (x, kernel)


def _decomposed_backward(padding, forms, precision, saved, dy):
  gradients = {
    platform: functools.partial(_gradients, name, padding, precision)
    for platform, name in forms
  }
  return _by_platform(gradients, *saved, dy)


def _gradients(name, padding, precision, x, kernel, dy):
  """Returns the gradients of the input and of the kernel."""
  form = IMPLEMENTATIONS["channels" if name in TRANSPOSE else name]
  (of_kernel,) = jax.linear_transpose(
    lambda kernel: form(x, kernel, padding, precision), kernel
  )(dy)
  if name in TRANSPOSE:
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    sides = zip(kernel.shape[:3], padding, strict=True)
    edges = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in sides)
    form = IMPLEMENTATIONS[TRANSPOSE[name]]
    return form(dy, flipped, edges, precision), of_kernel
  (of_input,) = jax.linear_transpose(
    lambda x: form(x, kernel, padding, precision), x
  )(dy)
  return of_input, of_kernel


def _by_platform(functions, *operands) -> Any:
  """Calls the function for the platform that the program is lowered for."""
  if len(functions) == 1:
    return functions["default"](*operands)
  return lax.platform_dependent(*operands, **functions)


_decomposed.defvjp(_decomposed_forward, _decomposed_backward)
