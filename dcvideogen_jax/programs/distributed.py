"""Runs a program in several processes together, one on each machine (SPMD).

On a TPU pod, under Slurm or Open MPI each process is started with
--distributed. Elsewhere each process is told the address of process 0
(--coordinator), the number of processes (--processes) and its own number
(--process).

All processes run the same program and end with the same exit code. Only process
0 prints, and only its output directory is kept (`common.output_directory`). If
one process fails alone, it notifies the others, which end with it
(`processes`).
"""

import os
import sys
from collections.abc import Sequence

from absl import flags

from dcvideogen_jax import errors

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Run as one of several processes, which find each other through the TPU pod,"
  " Slurm or Open MPI.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "Address of process 0 as host:port, where --distributed cannot find it. Needs"
  " --processes and --process.",
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "Number of processes that run the program together."
)
_PROCESS = flags.DEFINE_integer(
  "process", None, "Number of this process, from 0 to --processes - 1."
)

# Seconds that a process which ends waits for the others: all end together.
_LAST_WORDS = 60


def join(saves: bool = False) -> None:
  """Joins the other processes that the flags describe, if any.

  Call it before anything else asks jax for devices. It returns once all
  processes have joined.

  Args:
    saves: whether SIGTERM is deferred until the program asks for it, in all
      processes at the same step (`train.loop`), so that it can save. Otherwise
      SIGTERM ends the process that receives it.

  Raises:
    errors.UserError: if the flags contradict each other, or the other processes
      do not join.
  """
  given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if given == (None, None, None) and not _DISTRIBUTED.value:
    return
  if not _DISTRIBUTED.value:
    if None in given:
      raise errors.UserError(
        "--coordinator, --processes and --process belong together"
      )
    if ":" not in given[0] or not 0 <= given[2] < given[1]:
      raise errors.UserError(
        "--coordinator must be host:port and --process within 0.."
        f"{given[1] - 1}, found {given[0]} and {given[2]}"
      )
  import jax

  from dcvideogen_jax import processes

  jax.config.update("jax_enable_preemption_service", saves)
  try:
    jax.distributed.initialize(*given, shutdown_timeout_seconds=_LAST_WORDS)
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(f"cannot join the other processes: {e}") from e
  processes.watch()
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w")


def together() -> bool:
  """Whether the flags start processes that communicate; see `join`."""
  return _DISTRIBUTED.value or _COORDINATOR.value is not None


def apart() -> bool:
  """Whether the flags start processes that do not communicate; see `share`."""
  return not together() and _PROCESSES.value is not None


def of_first(values: Sequence[int]) -> list[int]:
  """Returns the values of process 0, in all processes that have joined.

  Args:
    values: as many in every process.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if not jax.distributed.is_initialized():
    return [*values]
  told = multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32))
  return told.tolist()


def wait() -> None:
  """Returns once all joined processes have called it: a barrier."""
  import jax
  from jax.experimental import multihost_utils

  if jax.distributed.is_initialized():
    multihost_utils.sync_global_devices("all came here")


def share() -> tuple[int, int]:
  """Returns the number of this process and how many processes share the work.

  This is for a program whose processes do not communicate: --processes and
  --process are enough. With --distributed or --coordinator it calls `join`.

  Raises:
    errors.UserError: as `join`, and for a --process that is not below
      --processes.
  """
  if together():
    import jax

    join()
    return jax.process_index(), jax.process_count()
  count, index = _PROCESSES.value or 1, _PROCESS.value or 0
  if not 0 <= index < count:
    raise errors.UserError(
      f"--process must be below --processes={count}, not {index}"
    )
  return index, count
