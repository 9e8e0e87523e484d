"""Ends all joined processes together when one of them fails.

If only the failing process ended, the others would wait for it inside a
collective operation. So it leaves a note with jax's coordination service. A
thread of each other process finds the note, prints the same message and exits
with the same code.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time

from jax._src import distributed  # jax has no public client of the service.

_FAILED, _HEARD = "dcvideogen_jax/failed", "dcvideogen_jax/heard"
_LOOK = 1.0  # Seconds between two looks for a note.
# Seconds that a process waits after it has found a note, as it often fails by
# itself with the same error; and seconds that an ending process waits for all
# others to confirm the note.
_PATIENCE, _HEARING = 5.0, 20.0
_ending = threading.Lock()


def watch() -> None:
  """Starts the thread that looks for notes; call it once all have joined."""
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(done,), daemon=True)
  thread.start()

  def stop():
    done.set()
    thread.join()

  atexit.register(stop)


def joined() -> bool:
  """Whether this process has joined others."""
  state = distributed.global_state
  return state.client is not None and state.num_processes > 1


def end(message: str, code: int) -> None:
  """Ends this process and those that it has joined; returns if it is alone.

  The other processes are ended at once, without any clean-up.

  Args:
    message: one line, which all processes print.
    code: exit code of all processes.
  """
  if not joined():
    return
  client = distributed.global_state.client
  # The lock is never released, so that only one thread ends the process.
  _ending.acquire()
  note = json.dumps([distributed.global_state.process_id, message, code])
  # This raises if another process has left its note first, or the service is
  # gone.
  with contextlib.suppress(Exception):
    client.key_value_set(_FAILED, note)
  _exit(message, code)


def _watch(done: threading.Event) -> None:
  client = distributed.global_state.client
  while not done.wait(_LOOK):
    try:
      note = client.key_value_try_get(_FAILED)
    except Exception:  # No note is there, or the service is gone.
      continue
    done.wait(_PATIENCE)
    if _ending.acquire(blocking=False):
      index, message, code = json.loads(note)
      _exit(f"process {index}: {message}", code)
    return


def _exit(message: str, code: int) -> None:
  """Prints the message, waits until all others have the note, and exits."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  state, until = distributed.global_state, time.monotonic() + _HEARING
  with contextlib.suppress(Exception):  # The service may be gone.
    state.client.key_value_set(f"{_HEARD}/{state.process_id}", "")
    while time.monotonic() < until:
      if len(state.client.key_value_dir_get(_HEARD)) == state.num_processes:
        break
      time.sleep(_LOOK / 10)
  if state.process_id == 0:
    time.sleep(_LOOK)  # Process 0 runs the service, which others still ask.
  sys.stdout.flush()
  os._exit(code)
