"""Says what is installed, which devices there are, and what would fit.

  dcvideogen doctor
  dcvideogen doctor --target=rtx4090
  dcvideogen doctor --json

It lists the packages and their versions, the devices and their free memory, the
caches and their sizes, and for DC-VideoGen's models and each size, whether a
video fits, with which flags of `dcvideogen sample`, and the least time. What
fits is estimated in seconds, without compiling or reading weights; `dcvideogen
plan sample` compiles. Wan's own autoencoder has no estimate.

The last lines say what to mend. The exit code is 1 if there is something.
"""

import json
import os
import sys
from collections.abc import Sequence

from absl import flags

_JSON = flags.DEFINE_bool(
  "json", False, "Print one JSON document instead of the tables."
)
_TARGET = flags.DEFINE_string(
  "target",
  None,
  "Device to say what fits on, such as h100, rtx4090 or v5e: one of those of"
  " `dcvideogen plan`, without the chips of a slice. Unset: the first device of"
  " this machine.",
)


def main(argv: Sequence[str]) -> None:
  """Prints the report and exits; never returns."""
  del argv
  # Otherwise jax takes most of a GPU's memory, only to look at it.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  from dcvideogen_jax.plan import fits, machine, tables

  devices = jax.devices()
  device = machine.device(devices)
  if _TARGET.value is not None:
    device = machine.target(_TARGET.value)
  found = machine.report(devices)
  rows = fits.rows(device)
  if _JSON.value:
    found["fits"] = {
      "target": _TARGET.value,
      "limit_bytes": device.limit,
      "dtype": device.dtype,
      "rows": [row._asdict() for row in rows],
    }
    print(json.dumps(found, indent=2))
  else:
    print(tables.machine(found))
    print(
      f"\nwhat fits on {_TARGET.value or devices[0].device_kind}, "
      f"{device.limit / 2**30:.1f} GiB, {device.dtype} (estimates)",
      flush=True,
    )
    print("  tiny                     fits on any device")
    for row in rows:
      print(tables.fitting(row), flush=True)
    print("\nto mend" if found["problems"] else "\nnothing to mend")
    for problem in found["problems"]:
      print(f"  {problem}")
  sys.exit(1 if found["problems"] else 0)
