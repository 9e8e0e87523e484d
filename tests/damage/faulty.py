"""Readers that do what none may do, to see that it is noticed."""

import json
import os
import pathlib
import signal
import tempfile
import time

import numpy as np

from dcvideogen_jax import errors
from tests.damage import reading

# Damages that a file of JSON like this one hardly survives unseen.
_DOCUMENT = {"numbers": [1.5, 2.5, 3.5], "names": ["one", "two"]}


def _make(directory: pathlib.Path) -> None:
  (directory / "file.json").write_text(json.dumps(_DOCUMENT))


def _whole(directory: pathlib.Path) -> bool:
  content = (directory / "file.json").read_bytes()
  return content == json.dumps(_DOCUMENT).encode()


def _faulty(fault):
  """Reads the whole file, but anything else in a bad way."""

  def read(directory):
    found = {"numbers": np.array(_DOCUMENT["numbers"])}
    return found if _whole(directory) else fault(directory)

  return read


def _allocates(directory):
  return {"numbers": np.zeros(2**33)}


def _waits(directory):
  time.sleep(60)


def _hangs(directory):
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
  time.sleep(60)


def _dies(directory):
  os.abort()


def _stumbles(directory):
  raise KeyError("numbers")


def _says_nothing(directory):
  raise errors.UserError("it is damaged")


def _leaves(directory):
  pathlib.Path(tempfile.mkdtemp(), "half").touch()
  raise errors.UserError(f"{directory}/file.json is damaged")


def _overwrites(directory):
  (directory / "file.json").write_text("{}")
  raise errors.UserError(f"{directory}/file.json is damaged")


def _gives_nan(directory):
  return {"numbers": np.full(3, np.nan)}


def _gives_others(directory):
  return {"numbers": np.arange(3.0)}


def _gives_more(directory):
  return {"numbers": np.arange(3.0), "more": 1}


def _right(directory):
  raise errors.UserError(f"{directory}/file.json is damaged")


# What each is found to do.
FAULTS = {
  "memory": _allocates,
  "slow": _waits,
  "slow, whatever it is told": _hangs,
  "crash": _dies,
  "traceback": _stumbles,
  "the sentence names no file": _says_nothing,
  "it left or changed ['scratch": _leaves,
  "it left or changed ['file.json']": _overwrites,
  "not finite": _gives_nan,
  "values": _gives_others,
  "names": _gives_more,
  "": _right,
}
INPUTS = tuple(
  reading.Input(name, "file.json", "json", _make, _faulty(fault))
  for name, fault in FAULTS.items()
)
