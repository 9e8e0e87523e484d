"""Starts `dcvideogen evaluate reconstruction`, or what --what says."""

import sys

from dcvideogen_jax.programs import cli

_PROGRAMS = {
  "reconstruction": "evaluate reconstruction",
  "generation": "evaluate generation",
  "semantic": "evaluate tiny",
  "vbench-folder": "evaluate vbench-folder",
}

if __name__ == "__main__":
  what = cli.take("what") or "reconstruction"
  if what not in _PROGRAMS:
    *others, last = _PROGRAMS
    names = f"{', '.join(others)} or {last}"
    print(f"error: --what must be {names}, found {what}", file=sys.stderr)
    sys.exit(2)
  cli.start(_PROGRAMS[what])
