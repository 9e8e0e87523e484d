"""The command `dcvideogen`, which imports and starts one program.

A program is a module of this package, named after the words of its command:
"plan train" is `plan_train.py`. The module defines absl flags and `main(argv)`,
and its docstring is the program's help. It may define PRESETS, a module whose
configs --config selects by name.
"""

import difflib
import importlib
import sys
import types

import dcvideogen_jax
from dcvideogen_jax.programs import pipes

# The words that name a program, and its line in `dcvideogen --help`.
PROGRAMS = {
  "sample": "makes videos from prompts, and from images",
  "stream": "makes videos chunk by chunk, of any length",
  "reconstruct": "encodes and decodes a video or an image",
  "convert": "converts weights from and to the layouts of PyTorch",
  "precompute": "encodes captioned videos, to train on their latents",
  "train": "trains the model of a config, or continues training",
  "export": "writes a trained model under the names of PyTorch",
  "evaluate reconstruction": "measures an autoencoder on held-out clips",
  "evaluate generation": "measures videos: FVD, fidelity to images, drift",
  "evaluate vbench-folder": "says whether VBench has all videos that it needs",
  "evaluate tiny": "measures videos of held-out scenes of the tiny world",
  "plan sample": "estimates memory and time of sampling on any device",
  "plan train": "estimates memory and time of a training step",
  "plan decode": "estimates memory and time of decoding within budgets",
  "plan attention": "estimates memory and time of attention",
  "app": "serves a page that makes videos",
  "completion": "prints what completes commands in bash and zsh",
  "doctor": "says what is installed, and what this machine can do",
  "prepare-clips": "makes the clips of the tiny autoencoder",
  "reproduce": "trains the tiny models that ship, from the start",
}


def main() -> None:
  """Starts the program that the command line names; never returns."""
  words = sys.argv[1:]
  if not words or words[0] in ("--help", "-h", "help"):
    with pipes.quiet():
      print(_list())
      sys.exit(0)
  if words[0] == "--version":
    print(f"dcvideogen {dcvideogen_jax.__version__}")
    sys.exit(0)
  if words[0] == "completion":  # Answers at once: without jax and flags.
    from dcvideogen_jax.programs import completion

    completion.main(words[1:], PROGRAMS)
  for count in (2, 1):
    name = " ".join(words[:count])
    if name in PROGRAMS:
      sys.argv = [f"dcvideogen {name}", *words[count:]]
      start(name)
  print(f"error: {_no_program(words)}", file=sys.stderr)
  sys.exit(2)


def start(name: str) -> None:
  """Runs a program of the table with the flags in `sys.argv`; never returns."""
  run(importlib.import_module(module_of(name)))


def module_of(name: str) -> str:
  """Returns the name of a program's module."""
  module = name.replace(" ", "_").replace("-", "_")
  return f"dcvideogen_jax.programs.{module}"


def run(module: types.ModuleType) -> None:
  """Runs a module's `main`, with its docstring as the help."""
  from dcvideogen_jax.programs import common

  sys.modules["__main__"].__doc__ = module.__doc__
  common.run(module.main, getattr(module, "PRESETS", None))


def given(flag: str) -> str | None:
  """Returns the value of a flag on the command line, before absl parses it.

  The modules of `launch/` choose by it which program to start.

  Args:
    flag: its name without dashes.

  Returns:
    The text of `--flag=text` or `--flag text`; "" for a bare `--flag`; None if
    the flag is absent.
  """
  return _find(flag)[1]


def take(flag: str) -> str | None:
  """Returns the value as `given` does, and removes the flag from `sys.argv`."""
  places, value = _find(flag)
  sys.argv[:] = [x for i, x in enumerate(sys.argv) if i not in places]
  return value


def _find(flag: str) -> tuple[range, str | None]:
  """Returns the indices in `sys.argv` that a flag takes up, and its value."""
  for i, argument in enumerate(sys.argv[1:], 1):
    name, equals, value = argument.partition("=")
    if name in (f"--{flag}", f"-{flag}"):
      after = sys.argv[i + 1 : i + 2]
      if equals or not after or after[0].startswith("-"):
        return range(i, i + 1), value
      return range(i, i + 2), after[0]
  return range(0), None


def _list() -> str:
  width = max(map(len, PROGRAMS))
  rows = [f"  {name:{width}}  {what}" for name, what in PROGRAMS.items()]
  return "\n".join(
    [
      "DC-VideoGen in JAX: dcvideogen PROGRAM --flag=value ...\n",
      *rows,
      "\n`dcvideogen PROGRAM --help` shows what one does, and its flags.",
    ]
  )


def _no_program(words: list[str]) -> str:
  """Returns the error message for a name that is not in `PROGRAMS`."""
  group = [name for name in PROGRAMS if name.split()[0] == words[0]]
  if group:
    return f"expected one of {', '.join(group)}, found {' '.join(words[:2])!r}"
  close = difflib.get_close_matches(words[0], PROGRAMS, n=1)
  hint = f", did you mean {close[0]}?" if close else ""
  return f"there is no program {words[0]!r}{hint or ': see dcvideogen --help'}"
