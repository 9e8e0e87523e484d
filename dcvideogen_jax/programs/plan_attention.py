"""Estimates memory and time of attention on a device you do not have.

  dcvideogen plan attention --tokens=17600,40800,163200 --blocks=2 --target=h100

compiles attention over each number of tokens, with 40 heads of 128 channels in
bfloat16, dense and block-causal, forward and backward, with every
implementation for the target. For this library's own kernels it also reports
registers and shared memory.

The exit code is 1 if a program does not fit or cannot be compiled. TPUs need
requirements-tpu.txt and GPUs requirements-cuda.txt, each best in an environment
of its own, and JAX_PLATFORMS=cpu. The workspaces of cuDNN's attention are
unknown without the device and are not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax.programs import plan_flags

_TOKENS = flags.DEFINE_list(
  "tokens",
  None,
  "Numbers of tokens per sample, separated by commas; each is a row per"
  " implementation.",
  required=True,
)
_BLOCKS = flags.DEFINE_integer(
  "blocks", 2, "Number of blocks of the block-causal mask.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Compiles attention for the target and prints a table."""
  del argv
  plan_flags.run(_attention)


def _attention(target: Any) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per program; returns the rows and whether all fit."""
  from dcvideogen_jax.plan import attention, tables

  rows = []
  sizes = plan_flags.numbers("tokens", int)
  print(tables.ATTENTION)
  for tokens in sizes:
    for case in attention.cases(target, tokens, _BLOCKS.value):
      figures = attention.try_to_measure(target, case)
      print(tables.attention(case, figures), flush=True)
      block = case["mask"].block if case["mask"] else None
      rows.append({**case, "mask": block, **figures})
  return rows, not any({"too_large", "refused"} & {*row} for row in rows)
