"""Estimates memory and time of decoding on devices you do not have.

  dcvideogen plan decode --model=f32t4c32 --target=h100 --height=2176 \\
    --width=3840 --budget_gib=8,16,24

compiles the decoding of one 40-frame chunk in the middle of a long video. It
prints a row per budget; a budget is the memory of each device beyond the
weights. The devices of the target share the columns of the picture. Where
compiling for a TPU would take long, the compiler makes less effort than on the
device. `python -m launch.plan` is this program; with --config it is `plan
train` or `plan sample`, and with --attention `plan attention`.

The exit code is 1 if a budget is exceeded. TPUs need requirements-tpu.txt and
GPUs requirements-cuda.txt, each best in an environment of its own, and
JAX_PLATFORMS=cpu. The workspaces of cuDNN's convolutions are unknown without
the device and are not counted.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dcvideogen_jax.programs import plan_flags

_MODELS = ["f32t4c32", "f32t4c64", "f32t4c128", "f32t4c256", "f64t4c128"]
_MODEL = flags.DEFINE_enum(
  "model", "f32t4c32", _MODELS, "Variant of DC-AE-V to decode with."
)
_DECODER = flags.DEFINE_enum(
  "decoder", None, [plan_flags.FAST], plan_flags.DECODER_HELP
)
_HEIGHT = flags.DEFINE_integer(
  "height", 704, "Height of the video in pixels.", 1
)
_WIDTH = flags.DEFINE_integer("width", 1280, "Width of the video in pixels.", 1)
_BUDGETS = flags.DEFINE_list(
  "budget_gib",
  ["8", "16", "24"],
  "Memory budgets of each device beyond the weights, in GiB, separated by"
  " commas.",
)
_WHOLE = flags.DEFINE_bool(
  "whole",
  True,
  "Also compile decoding of the whole frame at once, for comparison.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "bfloat16",
  ["bfloat16", "float32"],
  "dtype of the weights and the computation.",
)


def main(argv: Sequence[str]) -> None:
  """Compiles decoding for the target and prints a table."""
  del argv
  plan_flags.run(_decode)


def _decode(target: Any) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per budget; returns the rows and whether all budgets hold."""
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
    _DECODER.value == plan_flags.FAST,
  )
  which = " (fast decoder)" if _DECODER.value else ""
  print(
    f"{_MODEL.value}{which} decoding 40 frames of {size[0]}x{size[1]} on "
    f"{target.name}, {_DTYPE.value}\n{tables.DECODING}"
  )
  rows = []
  for row in decodings:
    print(tables.decoding(row), flush=True)
    rows.append(row)
  return rows, all(row["fits"] for row in rows)
