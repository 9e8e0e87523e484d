"""Checkpoints: what a run needs to continue as if it had never stopped.

Orbax is used here and nowhere else. A checkpoint is one directory per step
with the items "state" (arrays, in their shardings), "data" (the position of
the Grain iterator, one file per process) and "meta" (JSON). Orbax writes into
a temporary directory and renames it, so a killed process leaves either a whole
checkpoint or none; in an object store its last file, commit_success.txt, makes
a checkpoint count. Several processes share the directory and call everything
together.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dcvideogen_jax import errors, files, tree

# Orbax describes an item only if it knows the handler beforehand.
_HANDLERS = {
  "state": ocp.StandardCheckpointHandler,
  "data": grain.checkpoint.CheckpointHandler,
  "meta": ocp.JsonCheckpointHandler,
}


class Restored(NamedTuple):
  """What `restore` found; `data` has been put into the given iterator."""

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
      directory: one run's checkpoints.
      keep: how many of the newest to keep.
      read_only: change nothing there, where another process may be saving; the
        directory has to exist.

    Raises:
      errors.UserError: if the directory cannot be created.
    """
    self._read_only = read_only
    self._directory = files.path(directory)
    if not read_only:
      files.make_directory(directory)
    if not files.is_remote(self._directory):
      self._directory = self._directory.absolute()  # Orbax asks for that.
    # Half-written steps are swept away, but not those of a living process.
    self._options = (
      ocp.CheckpointManagerOptions(read_only=True, create=False)
      if read_only
      else ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      )
    )
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=self._options,
      item_handlers={name: handler() for name, handler in _HANDLERS.items()},
    )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc: object) -> None:
    self._manager.close()

  def save(
    self,
    step: int,
    state: Any,
    data: grain.DatasetIterator,
    meta: dict[str, Any] | None = None,
  ) -> None:
    """Starts saving; the arrays may be donated as soon as this returns.

    A step that is already there is left as it is.
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(data),
        meta=ocp.args.JsonSave({"step": step, **(meta or {})}),
      ),
      force=True,
    )

  def wait(self) -> None:
    """Blocks until the save under way is on disk."""
    self._manager.wait_until_finished()

  def restore(
    self,
    target: Any,
    data: grain.DatasetIterator | None = None,
  ) -> Restored | None:
    """Restores the newest readable checkpoint, or returns None if none exist.

    Where one cannot be read, a warning says so and the one before it is tried.
    Once that has been read, the others are renamed to "<step>.unreadable", so
    that a continued run can save these steps again.

    Args:
      target: tree of `jax.ShapeDtypeStruct`s whose shardings say where each
        leaf goes.
      data: iterator to put back to where it was.

    Raises:
      errors.UserError: if the newest readable checkpoint holds other leaves
        than `target` (all of them are listed) or the position of another number
        of processes, or none can be read.
    """
    self.wait()
    steps = sorted(self._manager.all_steps(), reverse=True)
    for i, step in enumerate(steps):
      found, problem = None, "another process failed"
      try:
        found = self._restore(step, target, data)
      except errors.UserError:
        raise
      # Orbax and TensorStore raise many types for a damaged file.
      except Exception as e:
        problem = _first_line(e)
      if _everywhere(found is not None):
        if i and not self._read_only:
          self._set_aside(steps[:i])
        return found
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
    tree.require_equal(
      tree.shapes(target), tree.shapes(stored.tree), f"checkpoint {step}"
    )
    # The manager's own `restore` waits for all processes, and would wait for
    # ever where one of them cannot read something.
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
  """Raises unless as many processes as there are now have saved the position.

  Raises:
    errors.UserError: saying how many have.
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
  """Whether all processes found it, once all of them have asked."""
  if jax.process_count() == 1:
    return found
  return bool(np.all(multihost_utils.process_allgather(np.array([found]))))


def _unused(path: files.Path) -> files.Path:
  """`path`, or `path` with the first free number behind it."""
  candidate, i = path, 1
  while candidate.exists():
    candidate, i = path.with_name(f"{path.name}.{i}"), i + 1
  return candidate


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0][:200] if text else type(error).__name__
