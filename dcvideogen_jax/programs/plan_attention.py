"""Says what attention takes on devices that are not there.

  dcvideogen plan attention --tokens=17600,40800,163200 --blocks=2 --target=h100

compiles attention of so many tokens, 40 heads of 128 in bfloat16, dense and
block-causal, forward and backward, in every implementation for the target; of
kernels of ours also the registers and the shared memory.

Exits with 1 if one does not fit or cannot be compiled. TPUs need
requirements-tpu.txt and GPUs requirements-cuda.txt, each best in an environment
of its own, and JAX_PLATFORMS=cpu. Workspaces of cuDNN's attention are not known
without the device and not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax.programs import plan_flags

_TOKENS = flags.DEFINE_list(
  "tokens", None, "Numbers of tokens of a sample.", required=True
)
_BLOCKS = flags.DEFINE_integer(
  "blocks", 2, "How many blocks the block-causal mask has.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  plan_flags.run(_attention)


def _attention(target: Any) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per program; returns all and whether they fit."""
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
