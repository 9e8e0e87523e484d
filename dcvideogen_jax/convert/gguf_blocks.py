"""The blocks of GGUF: how the bytes of each type hold numbers and scales.

The types and their layouts are those of ggml, as the package gguf 0.19.0 reads
them (its gguf/quants.py). That package is not used here: it maps files into
memory, makes float32 of whole tensors, and depends on requests, PyYAML and
tqdm. The tests compare every type with it, bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

Raw = UInt8[np.ndarray, "blocks bytes"]


class Numbers(NamedTuple):
  """What blocks hold: numbers, and a scale for every few of them.

  Attributes:
    values: numbers of an 8-bit integer dtype.
    scales: one for each group of the block's numbers.
    offsets: likewise, or None.
  """

  values: Shaped[np.ndarray, "blocks numbers"]
  scales: Float32[np.ndarray, "blocks groups"]
  offsets: Float32[np.ndarray, "blocks groups"] | None = None


class BlockType(NamedTuple):
  """A quantised type of GGUF.

  Attributes:
    name: as gguf calls it.
    numbers: numbers in a block.
    size: bytes of a block.
    group: numbers that share a scale.
    dtype: dtype of the numbers.
    read: reads blocks.
  """

  name: str
  numbers: int
  size: int
  group: int
  dtype: np.dtype
  read: Callable[[Raw], Numbers]


# Values of the 16 codes of IQ4_NL and IQ4_XS.
_TABLE = np.array(
  [-127, -104, -83, -65, -49, -35, -22, -10] + [1, 13, 25, 38, 53, 69, 89, 113],
  np.int8,
)


def _half(raw: Raw, at: int) -> np.ndarray:
  """Reads the float16 at a byte of every block: float32 of shape (n, 1)."""
  pair = np.ascontiguousarray(raw[:, at : at + 2])
  return pair.view("<f2").astype(np.float32)


def _bits(raw: Raw, width: int, span: int) -> np.ndarray:
  """Unpacks numbers of `width` bits, the lowest bits of `span` bytes first."""
  shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
  parts = raw.reshape(len(raw), -1, 1, span) >> shifts
  parts &= np.uint8((1 << width) - 1)
  return parts.reshape(len(raw), -1)


def _signed(codes: np.ndarray, zero: int) -> np.ndarray:
  """Returns codes below 128 less the code that stands for zero, as int8."""
  return codes.view(np.int8) - np.int8(zero)


def _q4_0(raw: Raw) -> Numbers:
  return Numbers(_signed(_bits(raw[:, 2:], 4, 16), 8), _half(raw, 0))


def _q4_1(raw: Raw) -> Numbers:
  return Numbers(_bits(raw[:, 4:], 4, 16), _half(raw, 0), _half(raw, 2))


def _five(low: Raw, high: UInt8[np.ndarray, "blocks 4"]) -> np.ndarray:
  """Joins 4 bits of each number with a fifth, one bit of a word of 32."""
  fifth = np.unpackbits(high, axis=1, bitorder="little")
  return _bits(low, 4, 16) | fifth << 4


def _q5_0(raw: Raw) -> Numbers:
  return Numbers(_signed(_five(raw[:, 6:], raw[:, 2:6]), 16), _half(raw, 0))


def _q5_1(raw: Raw) -> Numbers:
  codes = _five(raw[:, 8:], raw[:, 4:8])
  return Numbers(codes, _half(raw, 0), _half(raw, 2))


def _q8_0(raw: Raw) -> Numbers:
  return Numbers(raw[:, 2:].view(np.int8), _half(raw, 0))


def _q2_k(raw: Raw) -> Numbers:
  scales = raw[:, :16]
  return Numbers(
    _bits(raw[:, 16:80], 2, 32),
    _half(raw, 80) * (scales & 15),
    -(_half(raw, 82) * (scales >> 4)),
  )


def _q3_k(raw: Raw) -> Numbers:
  """Numbers of 3 bits, the third inverted; 16 scales of 6 bits."""
  third = _bits(raw[:, :32], 1, 32)
  codes = _bits(raw[:, 32:96], 2, 32) | third << 2
  scales = _bits(raw[:, 96:104], 4, 8) | _bits(raw[:, 104:108], 2, 4) << 4
  return Numbers(_signed(codes, 4), _half(raw, 108) * _signed(scales, 32))


def _pairs(raw: Raw) -> tuple[np.ndarray, np.ndarray]:
  """Reads 8 scales and 8 minima of 6 bits each from 12 bytes."""
  first, second, last = raw[:, :4], raw[:, 4:8], raw[:, 8:]
  return (
    np.concatenate([first & 63, last & 15 | first >> 6 << 4], 1),
    np.concatenate([second & 63, last >> 4 | second >> 6 << 4], 1),
  )


def _q4_k(raw: Raw) -> Numbers:
  scales, minima = _pairs(raw[:, 4:16])
  return Numbers(
    _bits(raw[:, 16:], 4, 32),
    _half(raw, 0) * scales,
    -(_half(raw, 2) * minima),
  )


def _q5_k(raw: Raw) -> Numbers:
  scales, minima = _pairs(raw[:, 4:16])
  return Numbers(
    _bits(raw[:, 48:], 4, 32) | _bits(raw[:, 16:48], 1, 32) << 4,
    _half(raw, 0) * scales,
    -(_half(raw, 2) * minima),
  )


def _q6_k(raw: Raw) -> Numbers:
  codes = _bits(raw[:, :128], 4, 64) | _bits(raw[:, 128:192], 2, 32) << 4
  scales = raw[:, 192:208].view(np.int8)
  return Numbers(_signed(codes, 32), _half(raw, 208) * scales)


def _iq4_nl(raw: Raw) -> Numbers:
  return Numbers(_TABLE[_bits(raw[:, 2:], 4, 16)], _half(raw, 0))


def _iq4_xs(raw: Raw) -> Numbers:
  low = _bits(raw[:, 4:8], 4, 1)
  high = _bits(raw[:, 2:4], 2, 1)
  scales = _signed(low | high << 4, 32)
  return Numbers(_TABLE[_bits(raw[:, 8:], 4, 16)], _half(raw, 0) * scales)


_I8, _U8 = np.dtype(np.int8), np.dtype(np.uint8)
# Number of a type in a file -> the type.
BLOCKS = {
  2: BlockType("Q4_0", 32, 18, 32, _I8, _q4_0),
  3: BlockType("Q4_1", 32, 20, 32, _U8, _q4_1),
  6: BlockType("Q5_0", 32, 22, 32, _I8, _q5_0),
  7: BlockType("Q5_1", 32, 24, 32, _U8, _q5_1),
  8: BlockType("Q8_0", 32, 34, 32, _I8, _q8_0),
  10: BlockType("Q2_K", 256, 84, 16, _U8, _q2_k),
  11: BlockType("Q3_K", 256, 110, 16, _I8, _q3_k),
  12: BlockType("Q4_K", 256, 144, 32, _U8, _q4_k),
  13: BlockType("Q5_K", 256, 176, 32, _U8, _q5_k),
  14: BlockType("Q6_K", 256, 210, 16, _I8, _q6_k),
  20: BlockType("IQ4_NL", 32, 18, 32, _I8, _iq4_nl),
  23: BlockType("IQ4_XS", 256, 136, 32, _I8, _iq4_xs),
}
PLAIN = {
  0: np.dtype(np.float32),
  1: np.dtype(np.float16),
  24: np.dtype(np.int8),
  25: np.dtype(np.int16),
  26: np.dtype(np.int32),
  27: np.dtype(np.int64),
  28: np.dtype(np.float64),
  30: np.dtype(ml_dtypes.bfloat16),
}
# Types that are not read, by number, as gguf calls them.
OTHERS = {
  9: "Q8_1",
  15: "Q8_K",
  16: "IQ2_XXS",
  17: "IQ2_XS",
  18: "IQ3_XXS",
  19: "IQ1_S",
  21: "IQ3_S",
  22: "IQ2_S",
  29: "IQ1_M",
  34: "TQ1_0",
  35: "TQ2_0",
  39: "MXFP4",
  40: "NVFP4",
  41: "Q1_0",
}
