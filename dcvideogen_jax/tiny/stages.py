"""Chains of our own programs, each of which reads what earlier ones made."""

import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcvideogen_jax import errors, files

# For glibc, which otherwise returns large buffers to the system after each step
# and gets them back page by page: 0.22 s instead of 0.17 for a step of the tiny
# base on two cores.
_KEEP_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
  "MALLOC_ARENA_MAX": "1",
}


class Stage(NamedTuple):
  """One run of a program.

  Attributes:
    name: of the stage.
    made: path in the work directory that is there when the stage is done.
    program: module under launch/.
    arguments: flags; "{work}" stands for the work directory.
    group: by which it is asked for; the name where it is empty.
  """

  name: str
  made: str
  program: str
  arguments: Sequence[str]
  group: str = ""


def train(name: str, config: str, *more: str, group: str = "") -> Stage:
  """A training whose weights end up in NAME/model."""
  return Stage(
    name,
    f"{name}/model",
    "train",
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
  """Runs the stages that are not done.

  A stage that fails ends the program with its exit code.

  Args:
    stages: in order.
    work: the work directory.
    until: the last group to run.
    extra: "GROUP:FLAG", which is added to the commands of a group.
    dry: only prints the commands.

  Returns:
    Whether all of `stages` are done now.

  Raises:
    errors.UserError: if there is no such group.
  """
  chosen = _until(stages, until)
  more = _extra(stages, extra)
  left = [stage for stage in chosen if not (work / stage.made).exists()]
  for stage in left:
    line = command(stage, work, more.get(_group(stage), ()))
    if dry:
      print(shlex.join(line))
      continue
    files.make_directory(work)
    print(f"{stage.name}: {shlex.join(line[1:])}", flush=True)
    start = time.monotonic()
    if code := subprocess.run(line, env=_KEEP_MEMORY | os.environ).returncode:
      sys.exit(code)
    print(f"{stage.name}: {time.monotonic() - start:.0f} s", flush=True)
  return all((work / stage.made).exists() for stage in stages)


def command(
  stage: Stage, work: pathlib.Path, extra: Sequence[str] = ()
) -> list[str]:
  """What is run for a stage."""
  arguments = [argument.format(work=work) for argument in stage.arguments]
  return [sys.executable, "-m", f"launch.{stage.program}", *arguments, *extra]


def _group(stage: Stage) -> str:
  return stage.group or stage.name


def _until(stages: Sequence[Stage], group: str | None) -> Sequence[Stage]:
  if group is None:
    return stages
  groups = [_group(stage) for stage in stages]
  if group not in groups:
    raise errors.UserError(
      f"--until must be one of {', '.join(dict.fromkeys(groups))}, found "
      f"{group!r}"
    )
  last = max(i for i, name in enumerate(groups) if name == group)
  return stages[: last + 1]


def _extra(
  stages: Sequence[Stage], given: Sequence[str]
) -> Mapping[str, Sequence[str]]:
  """Group -> flags."""
  groups = dict.fromkeys(_group(stage) for stage in stages)
  found: dict[str, list[str]] = {}
  for item in given:
    name, colon, flag = item.partition(":")
    if not colon or name not in groups:
      raise errors.UserError(
        f"--extra must be STAGE:FLAG with a stage out of {', '.join(groups)}, "
        f"found {item!r}"
      )
    found.setdefault(name, []).append(flag)
  return found
