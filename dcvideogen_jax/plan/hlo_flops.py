"""Counts the FLOPs of a matrix product or convolution in HLO text."""

import math
import re
from collections.abc import Sequence

import numpy as np

Sizes = Sequence[int]


def dot(result: Sizes, left: Sizes, right: Sizes, text: str) -> int:
  """Returns the FLOPs of a dot.

  Args:
    result, left, right: shapes of the result and of the operands.
    text: the instruction's text after its operands.
  """
  del right
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
  reduced = [left[int(i)] for i in axes[1].split(",") if i] if axes else []
  return 2 * math.prod(result) * math.prod(reduced)


def convolution(result: Sizes, left: Sizes, kernel: Sizes, text: str) -> int:
  """Returns the FLOPs of a convolution, without those on zeros.

  Zeros are the padding and the gaps of dilated rows. XLA for TPUs uses dilation
  to write a batch of matrix products as one convolution.

  Args:
    result, left, kernel: shapes of the result and of the operands.
    text: the instruction's text after its operands.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
  assert labels is not None, text
  inputs, kernels, outputs = (
    dict(zip(names, sizes, strict=True))
    for names, sizes in zip(
      labels.groups(), (left, kernel, result), strict=True
    )
  )
  window = re.search(r"window=\{([^}]*)\}", text)
  fields = dict(
    item.split("=") for item in (window[1].split() if window else ())
  )
  total = 2 * outputs["b"] * outputs["f"] * kernels["i"]
  for i in range(len(result) - 2):
    axis = str(i)
    numbers = {k: v.split("x")[i] for k, v in fields.items()}
    total *= _taps(inputs[axis], kernels[axis], outputs[axis], numbers)
  return total


def _taps(rows: int, kernel: int, results: int, window: dict[str, str]) -> int:
  """Counts pairs of an output row and a kernel tap that reads an input row."""
  stride, apart, step = (
    int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
  )
  before = int(window.get("pad", "0_0").split("_")[0])
  at = np.arange(results)[:, None] * stride - before
  at = at + np.arange(kernel) * step
  return int(((at >= 0) & (at % apart == 0) & (at // apart < rows)).sum())
