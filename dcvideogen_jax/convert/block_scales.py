"""Weights in NVFP4 and MXFP8, whose scales lie in the order of cuBLAS.

Scales of blocks of a row are padded to multiples of 128 rows and 4 columns.
Each tile of 128 by 4 lies in one piece, in the order of cuBLAS' block-scaled
products: rows 0, 32, 64 and 96 come first, then rows 1, 33, 65 and 97.
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dcvideogen_jax import errors
from dcvideogen_jax.convert import quantised_tensors, reading

# Dtypes of NVFP4's packed numbers and of its scales, and of MXFP8's scales.
# Some writers store scales as bytes.
BYTES = (np.dtype(np.uint8),)
SCALES = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8))
EXPONENTS = (np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(np.uint8))
_TILE = 128, 4
# Twice the value of each code of float4_e2m1.
_DOUBLED = np.array(
  [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8
)
# Columns of a block.
_NVFP4, _MXFP8 = 16, 32


def nvfp4(
  where: str,
  packed: reading.Tensor,
  scale: reading.Tensor,
  factor: Callable[[], np.float32],
  high_first: bool,
) -> reading.Tensor:
  """Makes a weight of NVFP4: numbers of 4 bits times two scales.

  Args:
    where: the layer, for messages.
    packed: two numbers in every byte.
    scale: scales of blocks of 16 columns.
    factor: reads the scale of the whole weight.
    high_first: whether the first number of a byte is in its high bits.

  Raises:
    errors.UserError: if the scales do not fit.
  """
  width = packed.shape[-1] * 2 if packed.shape else 0
  shape = (*packed.shape[:-1], width)
  scales = _scales(where, shape, scale, SCALES[0], _NVFP4)

  def rows(start: int, stop: int) -> quantised_tensors.Quantised:
    raw = reading.some_rows(packed, start, stop)
    pair = [raw >> 4, raw & 15] if high_first else [raw & 15, raw >> 4]
    values = _DOUBLED[np.stack(pair, -1)].reshape(stop - start, width)
    # The numbers are doubled, so the scales are halved.
    both = factor() * scales(start, stop) * np.float32(0.5)
    return quantised_tensors.Quantised(values, both, (1, _NVFP4))

  return reading.dequantised(
    shape,
    quantised_tensors.Stored("NVFP4", np.dtype(np.int8), (1, _NVFP4), rows),
  )


def mxfp8(
  where: str, weight: reading.Tensor, scale: reading.Tensor
) -> reading.Tensor:
  """Makes a weight of MXFP8: float8 times a power of two for 32 columns.

  Args:
    where: the layer, for messages.
    weight: the numbers.
    scale: exponents of blocks of 32 columns.

  Raises:
    errors.UserError: if the scales do not fit.
  """
  scales = _scales(where, weight.shape, scale, EXPONENTS[0], _MXFP8)

  def rows(start: int, stop: int) -> quantised_tensors.Quantised:
    values = reading.some_rows(weight, start, stop)
    return quantised_tensors.Quantised(values, scales(start, stop), (1, _MXFP8))

  return reading.dequantised(
    weight.shape,
    quantised_tensors.Stored("MXFP8", weight.dtype, (1, _MXFP8), rows),
  )


def _scales(
  where: str,
  shape: tuple[int, ...],
  scale: reading.Tensor,
  dtype: np.dtype,
  block: int,
) -> Callable[[int, int], np.ndarray]:
  """Returns a reader of the scales of rows of a weight of shape `shape`."""
  if len(shape) != 2 or shape[1] % block or not math.prod(shape):
    raise errors.UserError(
      f"{where} is quantised in blocks of {block}: expected rows of whole"
      f" blocks, found shape {shape}"
    )
  across = shape[1] // block
  padded = tuple(
    -(-n // size) * size
    for n, size in zip((shape[0], across), _TILE, strict=True)
  )
  if scale.shape != padded:
    raise errors.UserError(
      f"{where} has scales of shape {scale.shape}, which do not fit weights of"
      f" shape {shape}: expected {padded}"
    )
  height = _TILE[0]

  def read(start: int, stop: int) -> np.ndarray:
    first, last = start // height * height, -(-stop // height) * height
    raw = reading.some_rows(scale, first, last)
    ordered = in_order(raw)[start - first : stop - first, :across]
    return np.ascontiguousarray(ordered).view(dtype).astype(np.float32)

  return read


def in_order(
  tiles: Shaped[np.ndarray, "rows columns"],
) -> Shaped[np.ndarray, "rows columns"]:
  """Brings scales from the order of cuBLAS to that of rows and columns.

  Args:
    tiles: whole tiles, as they are stored.
  """
  height, width = _TILE
  down, across = tiles.shape[0] // height, tiles.shape[1] // width
  parts = tiles.reshape(down, across, height // 4, 4, width)
  return parts.transpose(0, 3, 2, 1, 4).reshape(tiles.shape)
