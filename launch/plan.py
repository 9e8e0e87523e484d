"""Says how much memory and work decoding takes on a GPU that is not there.

  python -m launch.plan --model=f32t4c32 --target=h100 --height=2176 \\
    --width=3840 --budget_gib=8,16,24

Compiles the very programs that would run, for one 40-frame chunk in the middle
of a long video, and prints a row per budget. Memory is what the compiler
allocates beyond the weights; convolution workspaces are not known without the
device and are not counted. Needs requirements-cuda.txt, best in an environment
of its own. Exits with 1 if something takes more than its budget.
"""

import json
import sys
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags

from dcvideogen_jax import files
from dcvideogen_jax.models import bands, dc_ae_v
from dcvideogen_jax.plan import decode, hardware
from launch import _program

_MODEL = flags.DEFINE_enum(
  "model", "f32t4c32", [*dc_ae_v.VARIANTS], "A released variant."
)
_TARGET = flags.DEFINE_enum("target", "h100", [*hardware.GPUS], "The GPU.")
_HEIGHT = flags.DEFINE_integer("height", 704, "Rows.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 1280, "Columns.", lower_bound=1)
_BUDGETS = flags.DEFINE_list(
  "budget_gib", ["8", "16", "24"], "Memory beyond the weights."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and computation."
)
_WHOLE = flags.DEFINE_bool(
  "whole", True, "Compile the whole frame too, for comparison."
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

_GIB = 2**30


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  dtype = jnp.dtype(_DTYPE.value)
  module = dc_ae_v.build(
    dc_ae_v.VARIANTS[_MODEL.value], dtype=dtype, param_dtype=dtype
  )
  size = (_HEIGHT.value, _WIDTH.value)
  device = hardware.gpu(_TARGET.value)
  plans = {
    f"{budget} GiB": bands.plan(
      module, *size, float(budget) * _GIB, decode=True
    )
    for budget in _BUDGETS.value
  }
  if _WHOLE.value:
    plans["whole"] = bands.Plan()
  plain = bands.work(module, *size, decode=True)
  print(
    f"{_MODEL.value} decoding 40 frames of {size[0]}x{size[1]} on "
    f"{_TARGET.value}, {_DTYPE.value}\n"
    "budget    cut rows state   runs  peak GiB  planned  temporaries  "
    "work  TFLOP"
  )
  rows, over = [], False
  for name, plan in plans.items():
    found = decode.measure(module, *size, plan, device)
    main_program = [*found["programs"].values()][-1]
    state = "host" if plan.offload else "device"
    over |= name != "whole" and found["bytes"] > float(name.split()[0]) * _GIB
    print(
      f"{name:9} {plan.cut or '-':>3} {plan.rows or '-':>4} {state:7}"
      f"{main_program['runs']:5}  {found['bytes'] / _GIB:8.2f} "
      f"{plan.bytes / _GIB:8.2f}  "
      f"{main_program['temporaries'] / _GIB:11.2f}  "
      f"{found['flops'] / plain:4.2f} {found['flops'] / 1e12:6.0f}",
      flush=True,
    )
    rows.append({"budget": name, "plan": vars(plan), **found})
  if _JSON.value:
    with files.atomic(_JSON.value) as path:
      path.write_text(json.dumps(rows, indent=2) + "\n")
  sys.exit(1 if over else 0)


if __name__ == "__main__":
  _program.run(main)
