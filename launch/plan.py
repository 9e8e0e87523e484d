"""Says how much memory and work something takes on a GPU that is not there.

Compiles the very programs that would run, as jax does on the device; memory is
what the compiler allocates. Workspaces of cuDNN's convolutions and attention,
and what autotuning holds at the first run, are not known without the device and
not counted. Needs requirements-cuda.txt, best in an environment of its own.
Exits with 1 if something does not fit.

  python -m launch.plan --model=f32t4c32 --target=h100 --height=2176 \\
    --width=3840 --budget_gib=8,16,24

decodes one 40-frame chunk in the middle of a long video: a row per budget, in
memory beyond the weights.

  python -m launch.plan --model=dc-wan2.1-t2v-14b --target=h100 --height=2176 \\
    --width=3840 --frames=80

samples a video with all models resident: the weights of each, every program,
and their sum beside what jax has of the device under `launch.sample`.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from dcvideogen_jax import errors, files
from dcvideogen_jax.models import bands, dc_ae_v, wan_dit
from dcvideogen_jax.plan import compiled, decode, hardware, sampling
from dcvideogen_jax.sample import sizes
from launch import _program

_MODEL = flags.DEFINE_enum(
  "model",
  "f32t4c32",
  [*dc_ae_v.VARIANTS, *wan_dit.VARIANTS],
  "An autoencoder, to decode; a transformer, to sample.",
)
_TARGET = flags.DEFINE_enum("target", "h100", [*hardware.GPUS], "The GPU.")
_HEIGHT = flags.DEFINE_integer("height", 704, "Rows.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 1280, "Columns.", lower_bound=1)
_BUDGETS = flags.DEFINE_list(
  "budget_gib", ["8", "16", "24"], "Decoding: memory beyond the weights."
)
_WHOLE = flags.DEFINE_bool(
  "whole", True, "Decoding: compile the whole frame too, for comparison."
)
_FRAMES = flags.DEFINE_integer(
  "frames", 80, "Sampling: of the video.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", 50, "Sampling: of the solver.", lower_bound=1
)
_GUIDED = flags.DEFINE_bool(
  "guided", True, "Sampling: with classifier-free guidance."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and computation."
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

_GIB = 2**30
_PASSES = {1: "one pass", 2: "two passes"}


# Flags that say nothing about what the other kind of model does.
_DECODING = ("budget_gib", "whole")
_SAMPLING = ("frames", "steps", "guided")


def main(argv: Sequence[str]) -> None:
  """Plans, compiles and prints."""
  del argv
  decoding = _MODEL.value in dc_ae_v.VARIANTS
  for name in _SAMPLING if decoding else _DECODING:
    if flags.FLAGS[name].present:
      raise errors.UserError(
        f"--{name} is not for {_MODEL.value}, an autoencoder"
        if decoding
        else f"--{name} is for autoencoders, and {_MODEL.value} is none"
      )
  device = hardware.gpu(_TARGET.value)
  figures, fits = _decode(device) if decoding else _sample(device)
  if _JSON.value:
    with files.atomic(_JSON.value) as path:
      path.write_text(json.dumps(figures, indent=2) + "\n")
  sys.exit(0 if fits else 1)


def _decode(device: jax.Device) -> tuple[list[dict[str, Any]], bool]:
  """Prints a row per budget; returns figures and whether all are kept."""
  dtype = jnp.dtype(_DTYPE.value)
  module, variables = compiled.part(
    "dc_ae_v", _MODEL.value, dtype=dtype, param_dtype=dtype
  )
  size = (_HEIGHT.value, _WIDTH.value)
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
    found = decode.measure(module, variables, *size, plan, device)
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
  return rows, not over


def _sample(device: jax.Device) -> tuple[dict[str, Any], bool]:
  """Prints weights, programs and their sum; returns them and if it fits."""
  gpu = hardware.GPUS[_TARGET.value]
  size = sizes.Size(_FRAMES.value, _HEIGHT.value, _WIDTH.value)
  parts = sampling.parts(_MODEL.value, _DTYPE.value)
  print(
    f"{_MODEL.value} sampling {size.frames} frames of "
    f"{size.height}x{size.width} on {_TARGET.value}, {_DTYPE.value}"
  )
  try:
    found = sampling.measure(
      parts,
      size,
      gpu.usable,
      device,
      guided=_GUIDED.value,
      steps=_STEPS.value,
    )
  except sampling.TooLarge as e:
    print(f"does not fit: {e}")
    return {"too_large": str(e)}, False
  print("weights             GiB")
  for name, n in found["weights"].items():
    print(f"{name:15} {n / _GIB:7.2f}")
  print(
    "program           runs  arguments  outputs  temporaries  others  "
    "all GiB   TFLOP"
  )
  for phase, report in found["phases"].items():
    for name, row in report["programs"].items():
      _print_program(f"{phase} {name}", report, row)
  fits = found["peak"] <= found["limit"]
  step = found["step"]
  seconds = gpu.roofline(step["flops"], step["bytes"], _DTYPE.value)
  print(
    f"all weights and the largest program: {found['peak'] / _GIB:.1f} of "
    f"{found['limit'] / _GIB:.1f} GiB, which "
    f"{'fits' if fits else 'does not fit'}\n"
    f"estimate, from the data sheet's peak rate: a step, "
    f"{step['flops'] / 1e12:.0f} TFLOP in {_PASSES[step['passes']]} of the "
    f"transformer, takes {seconds:.2f} s at the least, {_STEPS.value} steps "
    f"{_STEPS.value * seconds:.0f} s"
  )
  return {**found, "step_seconds_at_least": seconds}, fits


def _print_program(
  name: str, report: dict[str, Any], row: dict[str, int]
) -> None:
  others = row["waiting"] + report["held"]
  gib = [
    n / _GIB
    for n in (
      row["arguments"],
      row["outputs"],
      row["temporaries"],
      others,
      row["bytes"] + report["held"],
    )
  ]
  runs = report["runs"] * row["runs"]
  print(
    f"{name:17}{runs:5}  {gib[0]:9.2f}{gib[1]:9.2f}{gib[2]:13.2f}"
    f"{gib[3]:8.2f}{gib[4]:9.2f}{row['flops'] / 1e12:8.1f}"
  )


if __name__ == "__main__":
  _program.run(main)
