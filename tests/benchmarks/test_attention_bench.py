"""Rows of the attention benchmark: which implementations, and their FLOPs."""

import pytest

from benchmarks import attention


@pytest.mark.parametrize(("blocks", "pairs"), [(1, 64**2), (2, 3 * 32**2)])
@pytest.mark.parametrize(("backward", "products"), [(False, 2), (True, 7)])
def test_a_row(blocks, pairs, backward, products):
  names = ["chunked", "cudnn", "by_chunks"]
  row = attention.measure((64, 2, 16, "float32"), blocks, backward, names, 2)
  # cuDNN has no float32.
  assert [*row["ms"]] == [*row["tflops"]] == ["chunked", "by_chunks"]
  for name, ms in row["ms"].items():
    work = 2 * products * pairs * 2 * 16
    assert row["tflops"][name] == pytest.approx(work / ms / 1e9, rel=0.02)
  text = attention.table([row])
  assert "cudnn" not in text and f"| {row['ms']['chunked']:.4g} ms" in text
