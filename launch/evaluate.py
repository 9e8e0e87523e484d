"""Starts `dcvideogen evaluate reconstruction` or, as --what says, `tiny`."""

import sys

from dcvideogen_jax.programs import cli

_PROGRAMS = {
  "reconstruction": "evaluate reconstruction",
  "semantic": "evaluate tiny",
}

if __name__ == "__main__":
  what = cli.take("what") or "reconstruction"
  if what not in _PROGRAMS:
    names = " or ".join(_PROGRAMS)
    print(f"error: --what must be {names}, found {what}", file=sys.stderr)
    sys.exit(2)
  cli.start(_PROGRAMS[what])
