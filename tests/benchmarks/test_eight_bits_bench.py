"""Errors of kernels in eight bits, by the benchmark, on a narrow block."""

from benchmarks import eight_bits


def test_errors_are_those_of_the_formats():
  found = {row[:2]: row[2:] for row in eight_bits.measure(200, 2, 400)}
  assert len(found) == 6
  for (where, name), (errors, block) in found.items():
    # Half a step of 127, and half a unit in the last of four binary places.
    low, high = (0.004, 0.02) if name == "int8" else (0.01, 0.03)
    if where != "input" or name == "float8":
      assert low < min(errors.values()) and max(errors.values()) < high
      assert 0.5 * low < block < 5 * high
  # Large input channels widen the scales of all output channels.
  assert max(found["input", "int8"][0].values()) > 0.02
