"""What the programs `plan ...` share: the target, --json and exit codes."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from dcvideogen_jax import errors, files

_TARGET = flags.DEFINE_string(
  "target", "h100", "A GPU, such as h100, or a TPU slice, such as v5p:4x4x4."
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

Number = TypeVar("Number", int, float)


def run(plan: Callable[[Any], tuple[Any, bool]]) -> None:
  """Plans for the target, writes --json and exits; never returns.

  The exit code is 1 if something does not fit, and 2, with one sentence, if jax
  or the compiler refuses it; --verbosity=1 shows where.

  Args:
    plan: prints; gives figures, and whether all that was planned fits.
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
  """The positive numbers of a flag that is a list.

  Raises:
    errors.UserError: if one is none.
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
