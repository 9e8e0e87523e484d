"""Runs chains of programs; each reads the output of earlier ones."""

import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from dcvideogen_jax import errors, files

# Keeps glibc from returning large buffers to the system after each step and
# faulting them in again page by page: a step of the tiny base takes 0.17 s
# instead of 0.22 s on two cores.
_KEEP_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
  "MALLOC_ARENA_MAX": "1",
}


class Stage(NamedTuple):
  """One run of a program.

  Attributes:
    name: the name of the stage.
    output: path in the work directory that exists once the stage is done.
    program: a module, such as "launch.train".
    arguments: its flags; "{work}" stands for the work directory.
    group: the name that `run` takes for this stage and others; if empty, the
      stage's own name.
  """

  name: str
  output: str
  program: str
  arguments: Sequence[str]
  group: str = ""

  def is_done(self, work: pathlib.Path) -> bool:
    """Tells whether the output exists in the work directory.

    A training makes the folder of its weights when it starts, so that an empty
    folder does not count.
    """
    path = work / self.output
    return any(path.iterdir()) if path.is_dir() else path.exists()


def train(name: str, config: str, *more: str, group: str = "") -> Stage:
  """Makes a stage that trains and exports the weights to NAME/model.

  Args:
    name: name of the stage, and its folder in the work directory.
    config: the value of `--config`.
    *more: further flags of `launch.train`.
    group: as in `Stage`.
  """
  return Stage(
    name,
    f"{name}/model",
    "launch.train",
    (
      f"--config={config}",
      f"--workdir={{work}}/{name}",
      f"--export={{work}}/{name}/model",
      *more,
    ),
    group,
  )


def run(
  stages: Sequence[Stage],
  work: pathlib.Path,
  until: str | None = None,
  extra: Sequence[str] = (),
  dry: bool = False,
) -> bool:
  """Runs the stages that are not done yet.

  If a stage fails, this process exits with the stage's exit code.

  Args:
    stages: the stages in order.
    work: the work directory.
    until: the last group to run; None runs all.
    extra: "GROUP:FLAG" adds a flag to the commands of a group.
    dry: print the commands instead of running them.

  Returns:
    Whether all of `stages` are done now.

  Raises:
    errors.UserError: if `until` or `extra` names an unknown group, or if the
      current directory is no checkout.
  """
  groups = [stage.group or stage.name for stage in stages]
  names = ", ".join(dict.fromkeys(groups))
  if until is not None and until not in groups:
    raise errors.UserError(f"--until must be one of {names}, found {until!r}")
  flags: dict[str, list[str]] = {}
  for item in extra:
    group, colon, flag = item.partition(":")
    if not colon or group not in groups:
      raise errors.UserError(
        f"--extra must be STAGE:FLAG with a stage out of {names}, found "
        f"{item!r}"
      )
    flags.setdefault(group, []).append(flag)
  stop = len(stages)
  if until is not None:
    stop -= groups[::-1].index(until)
  for stage, group in zip(stages[:stop], groups, strict=False):
    if stage.is_done(work):
      continue
    arguments = [argument.format(work=work) for argument in stage.arguments]
    line = [sys.executable, "-m", stage.program, *arguments]
    line += flags.get(group, ())
    if dry:
      print(shlex.join(line))
      continue
    if not pathlib.Path("launch").is_dir():
      raise errors.UserError(
        "the chain runs programs of a checkout: start it where launch/ and "
        "configs/ are"
      )
    files.make_directory(work)
    print(f"{stage.name}: {shlex.join(line[1:])}", flush=True)
    start = time.monotonic()
    if code := subprocess.run(line, env=_KEEP_MEMORY | os.environ).returncode:
      sys.exit(code)
    print(f"{stage.name}: {time.monotonic() - start:.0f} s", flush=True)
  return all(stage.is_done(work) for stage in stages)
