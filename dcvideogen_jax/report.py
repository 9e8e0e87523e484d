"""Metrics of a run: a progress line, metrics.jsonl and TensorBoard events.

In an object store nothing grows: there `flush` writes the records and events
anew, as a whole. It is due before each checkpoint, so that who continues from
it finds what led to it; for those who watch it happens once a minute, too.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from dcvideogen_jax import errors, files

_PERIOD = 60  # seconds


class Records:
  """A file of JSON objects, one a line, that tell of a run's steps.

  Reopened at an earlier step it drops the records of later ones, and a line
  that a kill cut in half.
  """

  def __init__(self, path: str | os.PathLike[str], first_step: int):
    """Opens the file, or the one to be, to continue after a step."""
    self._path = files.path(path)
    # All of them, which an object store gets each time.
    self._lines: list[str] = []
    self._waiting = self._path.exists()
    if self._waiting:
      self._lines = _up_to(self._path.read_text(), first_step)
    self.flush()
    if not files.is_remote(self._path):
      self._lines = []

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a record, which has its "step"."""
    line = json.dumps(record) + "\n"
    if files.is_remote(self._path):
      self._lines.append(line)
      self._waiting = True
    else:
      with files.writing(self._path), self._path.open("a") as out:
        out.write(line)

  def flush(self) -> None:
    """Writes what waits, in an object store; elsewhere nothing does."""
    if self._waiting:
      with files.atomic(self._path) as temporary:
        temporary.write_text("".join(self._lines))
    self._waiting = False


def _up_to(text: str, step: int) -> list[str]:
  """The whole lines of text that tell of `step` or an earlier one."""
  kept = []
  for line in text.splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(f"{line}\n")
    except (ValueError, KeyError, TypeError):
      continue
  return kept


class History:
  """Appends to history.jsonl what this process read for each step.

  A line is {"step": n, "samples": [digest of each sample]}. Process i > 0
  writes history.<i>.jsonl. Reopening a run at an earlier step drops what was
  read after that step, so what stays led to the parameters.
  """

  def __init__(self, directory: str | os.PathLike[str], first_step: int):
    """Opens the file to continue after `first_step`."""
    index = jax.process_index()
    name = f"history.{index}.jsonl" if index else "history.jsonl"
    self._records = Records(files.path(directory) / name, first_step)

  def add(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
    """Records the batch of a step; each array has a leading batch axis."""
    columns = [np.asarray(batch[name]) for name in sorted(batch)]
    samples = [_digest(row) for row in zip(*columns, strict=True)]
    self._records.add({"step": step, "samples": samples})

  def flush(self) -> None:
    """Writes what waits; due before a checkpoint."""
    self._records.flush()


def _digest(arrays: tuple[np.ndarray, ...]) -> str:
  """16 hexadecimal digits that stand for the content of one sample."""
  found = hashlib.blake2b(digest_size=8)
  for array in arrays:
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


class Work(NamedTuple):
  """What a step does, for its speed.

  Attributes:
    clips: of a batch.
    flops: that the model needs; 0 is not known.
    peak: FLOPs per second of all devices; None is not known.
  """

  clips: int
  flops: int = 0
  peak: float | None = None

  def speed(self, seconds: float) -> tuple[dict[str, float], str]:
    """Metrics of a step that takes so long, and how a line shows them.

    "mfu", the utilisation, is "flops_per_second" over the peak.
    """
    metrics = {
      "seconds_per_step": seconds,
      "clips_per_second": self.clips / seconds,
    }
    line = f"{seconds:.3f} s/step  {metrics['clips_per_second']:.1f} clips/s"
    if self.flops:
      rate = metrics["flops_per_second"] = self.flops / seconds
      line += f"  {rate / 1e12:.3g} TFLOP/s"
      if self.peak:
        metrics["mfu"] = rate / self.peak
        line += f"  mfu {metrics['mfu']:.3f}"
    return metrics, line


class Report:
  """Writes what a run measures; use one per run, on the first process only.

  Reopening a run at an earlier step drops what was logged after that step, so
  a resumed run leaves the same records as an uninterrupted one.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    total_steps: int,
    first_step: int = 0,
  ):
    """Opens the records under `directory`.

    Args:
      directory: gets metrics.jsonl, tensorboard/ and strips/.
      total_steps: of the whole run, for the remaining time.
      first_step: where this process starts.

    Raises:
      errors.UserError: if the directory cannot be written to.
    """
    self._directory = files.make_directory(directory)
    self._total = total_steps
    self._records = Records(self._directory / "metrics.jsonl", first_step)
    self._spool = None
    events = os.fspath(self._directory / "tensorboard")
    if files.is_remote(directory):
      self._spool = tempfile.TemporaryDirectory()
      events = self._spool.name
    with files.writing(self._directory):
      self._board = _Board(events, first_step + 1)
    self._mark = (first_step, time.monotonic())
    self._flushed = time.monotonic()

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, kind: object, value: object, traceback: object) -> None:
    try:
      self.flush()
      self._board.close()
    except errors.UserError:
      if kind is None:  # Otherwise what has ended the run is told.
        raise
    finally:
      if self._spool:
        self._spool.cleanup()

  def flush(self) -> None:
    """Sees to it that what was recorded is in the directory."""
    self._records.flush()
    self._board.flush()
    if self._spool:
      files.upload(self._spool.name, self._directory / "tensorboard")
    self._flushed = time.monotonic()

  def note(self, text: str) -> None:
    """Prints one line at once, so that a wait is not read as a hang."""
    print(text, flush=True)

  def progress(
    self, step: int, metrics: Mapping[str, float], work: Work
  ) -> None:
    """Prints the progress line and records the metrics with their speed.

    The speed is that since the last call or `restart_clock`.
    """
    last, then = self._mark
    now = time.monotonic()
    self._mark = (step, now)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    line, speed = f"step {step}/{self._total}  {shown}", {}
    if step > last:
      seconds = (now - then) / (step - last)
      speed, text = work.speed(seconds)
      line += f"  {text}  ETA {_clock((self._total - step) * seconds)}"
    self.note(line)
    self.record(step, {**metrics, **speed})

  def restart_clock(self, step: int) -> None:
    """Leaves what happened so far (compiling, evaluating) out of the speed."""
    self._mark = (step, time.monotonic())

  def record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line to metrics.jsonl and the same to TensorBoard."""
    self._records.add({"step": step, **metrics})
    for name, value in metrics.items():
      self._board.add(step, summary.scalar(name, value))
    if not self._spool or time.monotonic() > self._flushed + _PERIOD:
      self.flush()

  def image(self, step: int, name: str, pixels: np.ndarray) -> files.Path:
    """Writes a PNG under strips/ and shows it in TensorBoard.

    Args:
      step: becomes part of the file name.
      name: likewise.
      pixels: uint8 "h w 3".

    Returns:
      The path of the PNG.
    """
    path = files.make_directory(self._directory / "strips") / (
      f"{name}_{step:07d}.png"
    )
    with files.atomic(path) as temporary:
      Image.fromarray(pixels).save(temporary)
    self._board.add(step, summary.image(name, pixels, dataformats="HWC"))
    return path


class _Board:
  """Writes TensorBoard events in the caller's thread.

  A `SummaryWriter` writes in a thread of its own, which ends at the first
  error; ten events later the program would wait for it for ever.
  """

  def __init__(self, directory: str, purge_step: int):
    """Opens a new file, which hides what was written of later steps."""
    os.makedirs(directory, exist_ok=True)
    self._path = files.path(directory)
    prefix = os.path.join(directory, "events")
    self._writer = event_file_writer.EventsWriter(prefix)
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=purge_step, session_log=begin)

  def add(self, step: int, value: Any) -> None:
    """Appends a summary of a step."""
    self._write(step=step, summary=value)

  def _write(self, **fields: Any) -> None:
    event = event_pb2.Event(wall_time=time.time(), **fields)
    with files.writing(self._path):
      self._writer.write_event(event)

  def flush(self) -> None:
    """Puts all events on the disk."""
    with files.writing(self._path):
      self._writer.flush()

  def close(self) -> None:
    """Does so, and closes the file."""
    with files.writing(self._path):
      self._writer.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
