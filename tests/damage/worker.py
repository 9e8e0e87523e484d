"""Reads damaged inputs, one after another, and tells what came of each.

  python -m tests.damage.worker DIRECTORY MODULE SECONDS

MODULE has the `INPUTS`, each of which may take so many seconds. Says when it is
ready, then gets the number of a case per line on stdin and answers with a line
of JSON.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np

from dcvideogen_jax import errors
from tests.damage import damage as damage_lib
from tests.damage import reading

SEED = 16
# Bytes of address space that reading may take beyond what is in use.
_MEMORY = 2 << 30


class _TooLong(BaseException):
  pass


def _too_long(*_):
  raise _TooLong


def main(root: pathlib.Path, module: str, longest: int) -> None:
  signal.signal(signal.SIGALRM, _too_long)
  inputs = importlib.import_module(module).INPUTS
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Whatever libraries print is no answer.
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    number = int(line)
    found = attempt(inputs[number % len(inputs)], root, number, longest)
    print(json.dumps(found), file=answers, flush=True)


def attempt(
  given: reading.Input, root: pathlib.Path, number: int, longest: int
) -> dict:
  """Damages an input and reads it.

  Args:
    given: what is damaged.
    root: a directory to do it in.
    number: of the case, which decides about the damage.
    longest: seconds that reading may take.

  Returns:
    "number", "input", "damage", "field", "outcome" and more, by outcome:
      equal: what is read is what the whole input holds.
      values, names: other values; other names or shapes.
      sentence: an `errors.UserError`, with "message".
      traceback, memory, slow: with "message".
    "said", warnings; "left", files that were not there before; "seconds".
  """
  whole, expected = _expected(given, root)
  case = root / f"case{number}"
  shutil.copytree(whole, case)
  done = _damage(given, case, np.random.default_rng((SEED, number)))
  before, scratch = _listed(case), root / "scratch"
  scratch.mkdir()
  tempfile.tempdir = str(scratch)
  said: list[str] = []
  start = time.perf_counter()
  with _listening(said):
    outcome, message, found = _read(given, case, longest)
  seconds = time.perf_counter() - start
  tempfile.tempdir = None
  if found is not None:
    outcome, message = _compare(expected, found)
  left = [str(p.relative_to(root)) for p in scratch.rglob("*")]
  after = _listed(case)
  if given.writes:
    left += [n for n in after.keys() - before.keys() if "/." in f"/{n}"]
  else:
    left += [n for n in {*before, *after} if before.get(n) != after.get(n)]
  named = case.name in message or pathlib.Path(done.path).name in message
  shutil.rmtree(scratch)
  shutil.rmtree(case)
  return {
    "number": number,
    "input": given.name,
    "damage": f"{done.path}: {done.description}",
    "field": done.field,
    "outcome": outcome,
    "message": message,
    "named": named,
    "said": said,
    "left": left,
    "seconds": round(seconds, 2),
  }


@functools.cache
def _made(make, root):
  directory = root / f"whole{_made.cache_info().misses}"
  directory.mkdir()
  make(directory)
  return directory


@functools.cache
def _expected(given, root):
  """The whole input, and what is read of it."""
  whole = _made(given.make, root)
  copy = root / "copy"
  shutil.copytree(whole, copy)
  found = given.read(copy)
  shutil.rmtree(copy)
  return whole, _plain(found)


class _Done(damage_lib.Damage):
  path: str


def _damage(given, directory, random):
  """Damages one of the files."""
  paths = sorted(p for p in directory.glob(given.target) if p.is_file())
  path = paths[int(random.integers(len(paths)))]
  done = damage_lib.damage(path, given.form, random)
  found = _Done(*done)
  found.path = path.relative_to(directory).as_posix()
  return found


def _listed(directory):
  return {
    p.relative_to(directory).as_posix(): hashlib.sha1(p.read_bytes()).digest()
    for p in directory.rglob("*")
    if p.is_file()
  }


class _Said(logging.Handler):
  def __init__(self, said):
    super().__init__(logging.WARNING)
    self._said = said

  def emit(self, record):
    self._said.append(record.getMessage())


@contextlib.contextmanager
def _listening(said):
  """Keeps warnings, and what is logged as one."""
  handler = _Said(said)
  logging.getLogger().addHandler(handler)
  try:
    with warnings.catch_warnings(record=True) as found:
      warnings.simplefilter("always")
      yield
  finally:
    logging.getLogger().removeHandler(handler)
    said += [str(w.message) for w in found]


def _read(given, directory, longest):
  """Outcome, message and, where it was read, what."""
  _limit_memory(_MEMORY)
  signal.alarm(longest)
  try:
    found = _plain(given.read(directory))
    return "", "", found
  except errors.UserError as e:
    return "sentence", " ".join(str(e).split()), None
  except _TooLong:
    return "slow", traceback.format_exc(), None
  except MemoryError as e:
    return "memory", repr(e) + traceback.format_exc(), None
  except BaseException as e:
    memory = "RESOURCE_EXHAUSTED" in str(e)
    kind = "memory" if memory else "traceback"
    return kind, traceback.format_exc(), None
  finally:
    signal.alarm(0)
    _limit_memory(None)


def _limit_memory(more: int | None) -> None:
  limit = resource.RLIM_INFINITY
  if more is not None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _plain(found):
  """Arrays as they are, everything else as text."""
  return {
    name: value if isinstance(value, np.ndarray) else str(value)
    for name, value in found.items()
  }


def _compare(expected, found):
  shapes = [_shapes(x) for x in (expected, found)]
  if shapes[0] != shapes[1]:
    pairs = [set(x.items()) for x in shapes]
    return "names", str(sorted(map(str, pairs[0] ^ pairs[1]))[:6])
  different = [
    name
    for name, value in found.items()
    if not np.array_equal(value, expected[name])
  ]
  if not_finite := [n for n in different if not _finite(found[n])]:
    return "not finite", str(not_finite[:3])
  if different:
    change = different[0], expected[different[0]], found[different[0]]
    return "values", " ".join(str(change).split())[:200]
  return "equal", ""


def _shapes(found):
  return {
    name: (x.shape, str(x.dtype)) if isinstance(x, np.ndarray) else None
    for name, x in found.items()
  }


def _finite(value):
  if isinstance(value, np.ndarray):
    return bool(np.isfinite(value.astype(np.float64)).all())
  return re.search(r"\b(nan|inf)\b", value) is None


if __name__ == "__main__":
  with contextlib.redirect_stdout(sys.stderr):
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
