"""Checkpoints, from which a run continues as if it had never stopped.

Only this module uses Orbax. A checkpoint is one directory per step with the
items "state" (arrays, in their shardings), "data" (the position of the Grain
iterator, one file per process) and "meta" (JSON). Orbax writes into a temporary
directory and renames it, so a killed process leaves either a whole checkpoint
or none. In an object store a checkpoint counts once its last file,
commit_success.txt, exists. Several processes share the directory, and all of
them make each call together.

Orbax stores arrays without checksums. "meta" therefore holds a digest of every
leaf and of every data position, so that bits that flipped on a disk are
noticed.
"""

import contextlib
import functools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dcvideogen_jax import differences, digests, errors, files, tree

# Orbax returns an item's metadata only for handlers that were registered.
_HANDLERS = {
  "state": ocp.StandardCheckpointHandler,
  "data": grain.checkpoint.CheckpointHandler,
  "meta": ocp.JsonCheckpointHandler,
}
_DIGESTS = "digests"
_LONGEST = 2000  # Bytes of a message that processes exchange.


class Restored(NamedTuple):
  """A checkpoint that `restore` has read; "data" went into the iterator.

  Attributes:
    step: the checkpoint's step.
    state: the tree of arrays, in the shardings of the target.
    meta: the dictionary that was given to `save`, and "step".
  """

  step: int
  state: Any
  meta: dict[str, Any]


class Checkpointer:
  """Saves in the background and restores the newest readable checkpoint.

  Use as a context manager; leaving it waits for the save under way.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    keep: int = 3,
    read_only: bool = False,
  ):
    """Opens (and creates) the directory.

    Args:
      directory: holds the checkpoints of one run.
      keep: number of newest checkpoints to keep; older ones are deleted.
      read_only: whether nothing in the directory is changed, because another
        process may be saving to it. The directory must exist.

    Raises:
      errors.UserError: if the directory cannot be created.
    """
    self._read_only = read_only
    self._directory = files.path(directory)
    if not read_only:
      files.make_directory(directory)
    if not files.is_remote(self._directory):
      self._directory = self._directory.absolute()  # Orbax requires it.
    # Half-written steps are deleted on opening, except in read-only mode, where
    # another process may be writing them.
    self._options = (
      ocp.CheckpointManagerOptions(read_only=True, create=False)
      if read_only
      else ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      )
    )
    _hush()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=self._options,
      item_handlers={name: handler() for name, handler in _HANDLERS.items()},
    )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
    try:
      with self._saving():
        self._manager.close()
    except Exception as e:
      if kind is None:
        raise
      logging.warning("the last save failed, too: %s", _first_line(e))

  def save(
    self,
    step: int,
    state: Any,
    data: grain.DatasetIterator,
    meta: dict[str, Any] | None = None,
  ) -> None:
    """Starts saving; the arrays may be donated as soon as this returns.

    A step that has a checkpoint already is not saved again.

    Args:
      step: number of training steps that led to `state`.
      state: tree of arrays, saved in their shardings.
      data: iterator whose position is saved.
      meta: further values, which JSON can hold.

    Raises:
      errors.UserError: if the disk has no room for this save or the previous
        one.
    """
    if step in self._manager.all_steps():
      return
    known = {
      "state": digests.of_tree(state),
      "data": [int(x) for x in _gather(str(digests.of_json(data.get_state())))],
    }
    with self._saving():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=grain.checkpoint.CheckpointSave(data),
          meta=ocp.args.JsonSave(
            {"step": step, **(meta or {}), _DIGESTS: known}
          ),
        ),
        force=True,
      )

  def wait(self) -> None:
    """Blocks until the current save is on disk; raises like `save`."""
    with self._saving():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Turns the error of a full disk into a `UserError`.

    Errors of an object store are not the user's fault and are raised unchanged.
    """
    try:
      yield
    except Exception as e:
      reason = None if files.is_remote(self._directory) else _full(e)
      if reason is None:
        raise
      raise errors.UserError(
        f"cannot save to {self._directory}: {reason}; the checkpoints there are"
        " whole, and the same command continues from the newest"
      ) from e

  def restore(
    self,
    target: Any,
    data: grain.DatasetIterator | None = None,
  ) -> Restored | None:
    """Restores the newest readable checkpoint, or returns None if none exist.

    If a checkpoint cannot be read, or its values differ from those that were
    saved, it is logged as a warning and the next older one is tried. Once a
    checkpoint has been read, the newer unreadable ones are renamed to
    "<step>.unreadable", so that a continued run can save these steps again.

    Args:
      target: tree of `jax.ShapeDtypeStruct`s with the sharding of each leaf.
      data: iterator to set to the saved position; None leaves the position out.

    Raises:
      errors.UserError: if the newest readable checkpoint holds other leaves
        than `target` (all differences are listed), if its data position was
        saved by another number of processes, or if no checkpoint can be read.
    """
    self.wait()
    steps = sorted(self._manager.all_steps(), reverse=True)
    for i, step in enumerate(steps):
      found, wrong, problem = None, "", "another process failed"
      try:
        found = self._restore(step, target, data)
      except errors.UserError as e:
        wrong = str(e)
      # Orbax and TensorStore raise many types for a damaged file.
      except Exception as e:
        problem = _first_line(e)
      # The error is raised after the exchange, as the other processes would
      # wait for this one in it.
      if told := next(filter(None, _gather(wrong)), None):
        raise errors.UserError(told)
      if _everywhere(found is not None):
        damage = self._damage(found, data is not None)
        if _everywhere(damage is None):
          if i and not self._read_only:
            self._set_aside(steps[:i])
          return found
        problem = damage or problem
      logging.warning(
        "checkpoint %s cannot be read (%s), trying the one before it",
        self._directory / str(step),
        problem,
      )
    if steps:
      raise errors.UserError(
        f"none of the {len(steps)} checkpoints in {self._directory} can be read"
      )
    return None

  def _restore(
    self, step: int, target: Any, data: grain.DatasetIterator | None
  ) -> Restored:
    stored = self._manager.item_metadata(step)["state"]
    if stored is None:
      raise FileNotFoundError("its description of the state is missing")
    differences.require_equal(
      tree.shapes(target), tree.shapes(stored.tree), f"checkpoint {step}"
    )
    # The manager's own `restore` waits for all processes, and waits for ever if
    # one of them cannot read a file.
    directory = self._manager.directory / str(step)
    arguments = {
      "state": ocp.args.StandardRestore(target),
      "meta": ocp.args.JsonRestore(),
    }
    if data is not None:
      _require_processes(directory / "data", step)
      arguments["data"] = grain.checkpoint.CheckpointRestore(data)
    found = {
      name: _HANDLERS[name]().restore(directory / name, args=args)
      for name, args in arguments.items()
    }
    return Restored(step, found["state"], found["meta"])

  def _damage(self, found: Restored, with_data: bool) -> str | None:
    """Says what differs from the saved digests, or None; pops them from `meta`.

    All processes call this together.
    """
    known = found.meta.pop(_DIGESTS, None)
    where = self._directory / str(found.step)
    if known is None:
      logging.warning(
        "checkpoint %s is of an earlier version and has no digests: damaged"
        " values in it would not be noticed",
        where,
      )
      return None
    values = digests.of_tree(found.state)
    # The digests themselves may be damaged.
    if not isinstance(known, dict) or known.keys() != {"state", "data"}:
      return "its digests are damaged"
    if wrong := [k for k in values if values[k] != known["state"].get(k)]:
      more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
      return f"the values of {wrong[0]}{more} are not those that were saved"
    if with_data:
      index, count = jax.process_index(), jax.process_count()
      path = where / "data" / f"process_{index}-of-{count}.json"
      position = digests.of_json(json.loads(path.read_text()))
      if known["data"][index : index + 1] != [position]:
        return "the position in the data is not the one that was saved"
    return None

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again."""
    self._manager.close()
    if jax.process_index() == 0:
      for step in steps:
        damaged = self._directory / str(step)
        damaged.rename(_unused(damaged.with_name(f"{step}.unreadable")))
    _everywhere(True)
    self._manager = self._open()


def _require_processes(directory: files.Path, step: int) -> None:
  """Checks that the data position was saved by the present number of processes.

  Raises:
    errors.UserError: if it was saved by another number.
  """
  names = [path.name for path in directory.glob("process_*-of-*.json")]
  saved = {name.removesuffix(".json").rpartition("-")[2] for name in names}
  here = str(jax.process_count())
  if saved and here not in saved:
    raise errors.UserError(
      f"checkpoint {step} has the position in the data of"
      f" {' or '.join(sorted(saved))} processes, found {here}: continue with as"
      " many as before"
    )


def _everywhere(found: bool) -> bool:
  """Whether `found` is true in all processes, which call this together."""
  return all(_gather("x" if found else ""))


def _gather(text: str) -> list[str]:
  """Returns the text of each process, cut to `_LONGEST` bytes.

  All processes call this together.
  """
  if jax.process_count() == 1:
    return [text]
  padded = np.zeros(_LONGEST, np.uint8)
  data = text.encode()[:_LONGEST]
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  every = multihost_utils.process_allgather(padded)
  return [x.tobytes().rstrip(b"\0").decode(errors="ignore") for x in every]


def _full(error: BaseException | None) -> str | None:
  """Returns the reason if an error, or its cause, is a full disk; else None."""
  while error is not None:
    # TensorStore raises ValueErrors whose text has the error number.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
      cause = OSError(int(number[1]), os.strerror(int(number[1])))
    elif isinstance(error, OSError):
      cause = error
    else:
      cause = OSError()
    if files.is_full(cause):
      return cause.strerror
    error = error.__cause__ or error.__context__
  return None


@functools.cache
def _hush() -> None:
  """Silences log messages about errors that are raised as exceptions anyway.

  When a save fails, Orbax leaves its other writes running. Each of them ends
  after its event loop is closed, which TensorStore reports with a traceback.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_news)
  hook = sys.unraisablehook

  def heard(about: Any) -> None:
    if "Event loop is closed" not in str(about.exc_value):
      hook(about)

  sys.unraisablehook = heard
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log record is no traceback of an error that Orbax raises anyway.

  asyncio logs tracebacks of tasks that Orbax leaves running after a failure.
  """
  if not record.exc_info:
    return True
  return "orbax" not in record.pathname and _full(record.exc_info[1]) is None


def _unused(path: files.Path) -> files.Path:
  """Returns `path`, or `path` with the first free number appended."""
  candidate, i = path, 1
  while candidate.exists():
    candidate, i = path.with_name(f"{path.name}.{i}"), i + 1
  return candidate


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0][:200] if text else type(error).__name__
