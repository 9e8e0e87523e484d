"""Ends a program quietly once nothing reads its stdout, as after `| head`.

Python ignores SIGPIPE, so that a broken connection raises an error instead of
ending the process. Hence a write to a pipe without a reader raises
BrokenPipeError.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

# Exit code that a shell reports for a program that SIGPIPE (13) ended.
CODE = 128 + 13


def is_broken() -> bool:
  """Returns whether text for stdout is waiting that nothing will read."""
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    return True
  except (AttributeError, ValueError):  # There is no stdout, or it is closed.
    pass
  return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Replaces the end of a program whose stdout is broken by exit code `CODE`.

  The exit code of a program that fails for another reason stays.
  """
  try:
    yield
  except (BrokenPipeError, SystemExit) as e:
    if not is_broken():
      raise
    # Python flushes stdout once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit((isinstance(e, SystemExit) and e.code) or CODE)
