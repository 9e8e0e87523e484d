"""Several processes, one on each machine, that train together.

On a TPU pod, under Slurm or Open MPI each process is started with
--distributed. Elsewhere each says where process 0 listens, how many there are
and which of them it is.
"""

import jax
from absl import flags

from dcvideogen_jax import errors

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes that the machine knows of."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Join by hand: host:port of process 0."
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "How many there are, with --coordinator."
)
_PROCESS = flags.DEFINE_integer(
  "process", None, "Number of this one, from 0, with --coordinator."
)


def join() -> None:
  """Waits for the other processes that the flags speak of, if any.

  To be called before anything else asks jax for devices.

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
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(f"cannot join the other processes: {e}") from e
