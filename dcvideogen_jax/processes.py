"""Processes that have joined end together, whichever of them fails.

A process whose input is wrong ends, and the others would wait for it inside a
computation. So it leaves a note with jax's coordination service, where a thread
of each of the others finds it, says the same, and ends with the same code.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time

from jax._src import distributed  # The service has no other door.

_FAILED, _HEARD = "dcvideogen_jax/failed", "dcvideogen_jax/heard"
_LOOK = 1.0  # seconds between looks for a note
# Seconds that a process has to find out by itself, as it often does, and all
# others to have heard.
_PATIENCE, _HEARING = 5.0, 20.0
_ending = threading.Lock()


def watch() -> None:
  """Starts to look for notes of the others; due once they have joined."""
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(done,), daemon=True)
  thread.start()

  def stop():
    done.set()
    thread.join()

  atexit.register(stop)


def joined() -> bool:
  """Whether there are others."""
  state = distributed.global_state
  return state.client is not None and state.num_processes > 1


def end(message: str, code: int) -> None:
  """Ends this process and those that it has joined; returns if it is alone.

  Nothing is cleaned up in the others, which may be in the middle of anything.

  Args:
    message: one line, which all of them print.
    code: exit code of all of them.
  """
  if not joined():
    return
  client = distributed.global_state.client
  _ending.acquire()  # Never given back: one thread ends the process.
  note = json.dumps([distributed.global_state.process_id, message, code])
  with contextlib.suppress(Exception):  # Another one was first, or is gone.
    client.key_value_set(_FAILED, note)
  _exit(message, code)


def _watch(done: threading.Event) -> None:
  client = distributed.global_state.client
  while not done.wait(_LOOK):
    try:
      note = client.key_value_try_get(_FAILED)
    except Exception:  # There is none, or the service is gone.
      continue
    done.wait(_PATIENCE)
    if _ending.acquire(blocking=False):
      index, message, code = json.loads(note)
      _exit(f"process {index}: {message}", code)
    return


def _exit(message: str, code: int) -> None:
  """Prints, waits until all others have heard, and exits."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  state, until = distributed.global_state, time.monotonic() + _HEARING
  with contextlib.suppress(Exception):  # The service is gone, as all may be.
    state.client.key_value_set(f"{_HEARD}/{state.process_id}", "")
    while time.monotonic() < until:
      if len(state.client.key_value_dir_get(_HEARD)) == state.num_processes:
        break
      time.sleep(_LOOK / 10)
  if state.process_id == 0:
    time.sleep(_LOOK)  # It runs the service, which the others still ask.
  sys.stdout.flush()
  os._exit(code)
