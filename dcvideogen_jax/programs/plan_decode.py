"""Says what decoding takes on devices that are not there.

  dcvideogen plan decode --model=f32t4c32 --target=h100 --height=2176 \\
    --width=3840 --budget_gib=8,16,24

decodes one 40-frame chunk in the middle of a long video: a row per budget, in
memory of each device beyond the weights. The devices share the columns. Where
the compiler for a TPU would take long it makes less effort than on the device.
`python -m launch.plan` is this program, but with --config `plan train` or `plan
sample`, and with --attention `plan attention`.

Exits with 1 if a budget is exceeded. TPUs need requirements-tpu.txt and GPUs
requirements-cuda.txt, each best in an environment of its own, and
JAX_PLATFORMS=cpu. Workspaces of cuDNN's convolutions are not known without the
device and not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax.programs import plan_flags

_MODELS = ["f32t4c32", "f32t4c64", "f32t4c128", "f32t4c256", "f64t4c128"]
_MODEL = flags.DEFINE_enum("model", "f32t4c32", _MODELS, "The autoencoder.")
_HEIGHT = flags.DEFINE_integer("height", 704, "Rows of pixels.", 1)
_WIDTH = flags.DEFINE_integer("width", 1280, "Columns of pixels.", 1)
_BUDGETS = flags.DEFINE_list(
  "budget_gib", ["8", "16", "24"], "Budgets of memory beyond the weights."
)
_WHOLE = flags.DEFINE_bool(
  "whole", True, "Compile the whole frame too, for comparison."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and computation."
)


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  plan_flags.run(_decode)


def _decode(target: Any) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per budget; returns figures and whether all are kept."""
  from dcvideogen_jax.plan import autoencoder, tables

  size = (_HEIGHT.value, _WIDTH.value)
  numbers = plan_flags.numbers("budget_gib", float)
  decodings = autoencoder.decodings(
    _MODEL.value,
    size,
    dict(zip(_BUDGETS.value, numbers, strict=True)),
    _DTYPE.value,
    target,
    _WHOLE.value,
  )
  print(
    f"{_MODEL.value} decoding 40 frames of {size[0]}x{size[1]} on "
    f"{target.name}, {_DTYPE.value}\n{tables.DECODING}"
  )
  rows = []
  for row in decodings:
    print(tables.decoding(row), flush=True)
    rows.append(row)
  return rows, all(row["fits"] for row in rows)
