"""Completes programs, flags and their values in bash and zsh.

  source <(dcvideogen completion bash)    # in ~/.bashrc
  source <(dcvideogen completion zsh)     # in ~/.zshrc, after compinit

The shell asks `dcvideogen completion candidates WORD ...` what the last word
may become; names of files are completed where nothing else fits.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from dcvideogen_jax.programs import pipes

_BASH = """
_dcvideogen() {
  local line=${COMP_LINE:0:COMP_POINT} found
  local -a words
  read -ra words <<< "$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  mapfile -t found < <(
    dcvideogen completion candidates "${words[@]:1}" 2> /dev/null
  )
  COMPREPLY=("${found[@]}")
  # To bash, what follows "=" is a word of its own.
  [[ ${words[-1]} == *=* ]] && COMPREPLY=("${found[@]#*=}")
  [[ ${#found[@]} == 1 && ${found[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o default -F _dcvideogen dcvideogen
"""
_ZSH = """
#compdef dcvideogen
_dcvideogen() {
  local -a found
  found=(${(f)"$(
    dcvideogen completion candidates "${(@)words[2,CURRENT]}" 2> /dev/null
  )"})
  if (( $#found )); then
    compadd -S '' -a found
  else
    compset -P '*='
    _files
  fi
}
compdef _dcvideogen dcvideogen
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def main(words: Sequence[str], programs: Mapping[str, str]) -> None:
  """Prints a script or candidates, and exits; never returns.

  Args:
    words: after `dcvideogen completion`.
    programs: the programs by name, `cli.PROGRAMS`.
  """
  with pipes.quiet():
    match list(words):
      case [("bash" | "zsh") as shell]:
        print(SCRIPTS[shell].strip())
      case ["candidates", *typed]:
        print("\n".join(candidates(typed, programs)))
      case [] | ["--help" | "-h"]:
        print((__doc__ or "").strip())
      case _:
        print(
          f"error: expected {' or '.join(SCRIPTS)}, found {' '.join(words)!r}",
          file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(0)


def candidates(words: Sequence[str], programs: Mapping[str, str]) -> list[str]:
  """Returns what the last word of a command line may become.

  Args:
    words: after `dcvideogen`; the last may be "".
    programs: the programs by name.
  """
  *before, last = words or [""]
  program = _program(before, programs)
  if program is None:
    named = " ".join(before)
    start = f"{named} " if named else ""
    found = {
      name.removeprefix(start).split()[0]
      for name in programs
      if name.startswith(start)
    }
    return sorted(x for x in found if x.startswith(last))
  if not last.startswith("-"):
    return []
  return sorted(x for x in _flags(program) if x.startswith(last))


def _program(words: Sequence[str], programs: Mapping[str, str]) -> str | None:
  for count in (2, 1):
    name = " ".join(words[:count])
    if len(words) >= count and name in programs:
      return name
  return None


def _flags(program: str) -> Iterator[str]:
  """Yields the flags of a program: "--name=", or with each of its values."""
  from dcvideogen_jax.programs import cli

  module = importlib.import_module(cli.module_of(program))
  importlib.import_module("dcvideogen_jax.programs.common")
  yield "--help"
  for name, defined in flags.FLAGS.flags_by_module_dict().items():
    if name.startswith(__package__):
      for flag in defined:
        yield from _of_flag(flag)
  if (presets := getattr(module, "PRESETS", None)) is not None:
    yield from (f"--config={name}" for name in presets.MODELS)
    yield from (f"--config.{key}=" for key in _keys(presets.get_config()))


def _of_flag(flag: Any) -> Iterator[str]:
  if flag.boolean:
    yield from (f"--{flag.name}", f"--no{flag.name}")
  elif values := getattr(flag.parser, "enum_values", None):
    yield from (f"--{flag.name}={value}" for value in values)
  else:
    yield f"--{flag.name}="


def _keys(config: Any) -> Iterator[str]:
  """Yields the keys of a config, "a.b" for those of a config within."""
  for key in config:
    value = config[key]
    if hasattr(value, "keys"):
      yield from (f"{key}.{inner}" for inner in _keys(value))
    else:
      yield key
