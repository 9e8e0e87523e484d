"""Flags and exit codes shared by the programs `plan ...`."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from dcvideogen_jax import errors, files

_TARGET = flags.DEFINE_string(
  "target",
  "h100",
  "Hardware to compile for: a GPU, such as h100, or a TPU slice with the"
  " topology of its chips, such as v5p:4x4x4.",
)
_JSON = flags.DEFINE_string(
  "json",
  None,
  "JSON file to write the figures to. Unset: they are printed only.",
)

FAST = "fast"
DECODER_HELP = (
  "Decoder of DC-AE-V: fast, the smaller one, at the size that configs/"
  "dc_ae_v.py trains. Unset: the model's own."
)

Number = TypeVar("Number", int, float)


def run(plan: Callable[[Any], tuple[Any, bool]]) -> None:
  """Plans for the target, writes --json and exits; never returns.

  The exit code is 1 if a program does not fit, and 2, with one sentence on
  stderr, if jax or the compiler refuses it; --verbosity=1 shows where.

  Args:
    plan: gets the target and prints a table; returns figures for --json, and
      whether every program fits.
  """
  from dcvideogen_jax.plan import compiled, hardware

  target = hardware.find(_TARGET.value)
  with compiled.refusals():
    figures, fits = plan(target)
  if _JSON.value:
    with files.atomic(_JSON.value) as path:
      path.write_text(json.dumps(figures, indent=2) + "\n")
  sys.exit(0 if fits else 1)


def numbers(flag: str, kind: type[Number]) -> list[Number]:
  """Returns the positive numbers that a list flag holds.

  Args:
    flag: the flag's name.
    kind: int or float.

  Raises:
    errors.UserError: if an item is not a positive finite number, or the list is
      empty.
  """
  given = flags.FLAGS[flag].value
  try:
    found = [kind(text) for text in given]
  except ValueError:
    found = []
  if not found or not all(0 < n < math.inf for n in found):
    raise errors.UserError(
      f"--{flag}: expected positive numbers, found {','.join(given)!r}"
    )
  return found
