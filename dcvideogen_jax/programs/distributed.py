"""Several processes, one on each machine, that run a program together.

On a TPU pod, under Slurm or Open MPI each process is started with
--distributed. Elsewhere each says where process 0 listens, how many there are
and which of them it is.

All of them compute the same and end alike, with the same exit code where the
same is wrong; but only process 0 speaks, and what it writes stays
(`common.output_directory`). Where something is wrong in one of them only, the
others hear of it and end with it (`processes`).
"""

import os
import sys

from absl import flags

from dcvideogen_jax import errors

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes that the machine knows of."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Join by hand: host:port of process 0."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, from 0.")

# Of the wait for the others when one ends; all of them end together.
_LAST_WORDS = 60  # seconds


def join(saves: bool = False) -> None:
  """Waits for the other processes that the flags speak of, if any.

  To be called before anything else asks jax for devices.

  Args:
    saves: SIGTERM waits until the program asks for it, in all processes at the
      same step (`train.loop`); otherwise it ends the one that gets it.

  Raises:
    errors.UserError: for flags that do not fit, or when the others do not
      come.
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


def wait() -> None:
  """Returns once all processes that have joined came here."""
  import jax
  from jax.experimental import multihost_utils

  if jax.distributed.is_initialized():
    multihost_utils.sync_global_devices("all came here")


def share() -> tuple[int, int]:
  """Which of the processes this is, and how many share the work.

  For a program whose processes need nothing of each other: --processes and
  --process are enough. With the flags of `join` it joins.

  Raises:
    errors.UserError: as `join`.
  """
  if _DISTRIBUTED.value or _COORDINATOR.value is not None:
    import jax

    join()
    return jax.process_index(), jax.process_count()
  count, index = _PROCESSES.value or 1, _PROCESS.value or 0
  if not 0 <= index < count:
    raise errors.UserError(
      f"--process must be below --processes={count}, not {index}"
    )
  return index, count
