"""Metrics of a run: a progress line, metrics.jsonl and TensorBoard events.

Object stores cannot append, so there `flush` rewrites the files as a whole. It
runs before each checkpoint, so that a resumed run sees its own history, and
once a minute for people who watch.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from dcvideogen_jax import errors, files

# tensorboardX imports torch wherever torch is installed, which takes seconds
# and hundreds of megabytes. An entry of None makes that import fail.
_NO_TORCH = "torch" not in sys.modules
if _NO_TORCH:
  sys.modules["torch"] = None  # type: ignore[assignment]
try:
  from tensorboardX import event_file_writer, summary
  from tensorboardX.proto import event_pb2
finally:
  if _NO_TORCH:
    del sys.modules["torch"]

_PERIOD = 60  # Seconds between two flushes to an object store.


class Records:
  """A file of JSON objects, one per line, each with the "step" it belongs to.

  Reopening the file at an earlier step drops the records of later steps, and a
  line that was cut in half when a process was killed.
  """

  def __init__(self, path: str | os.PathLike[str], first_step: int):
    """Opens the file to continue after `first_step`; it need not exist yet."""
    self._path = files.path(path)
    # All lines, for an object store, where the file is rewritten each time.
    self._lines: list[str] = []
    self._waiting = self._path.exists()
    if self._waiting:
      self._lines = _up_to(self._path.read_text(), first_step)
    self.flush()
    if not files.is_remote(self._path):
      self._lines = []

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a record, which must have a "step"."""
    line = json.dumps(record) + "\n"
    if files.is_remote(self._path):
      self._lines.append(line)
      self._waiting = True
    else:
      with files.writing(self._path), self._path.open("a") as out:
        out.write(line)

  def flush(self) -> None:
    """Rewrites the file in an object store; local lines are written already."""
    if self._waiting:
      with files.atomic(self._path) as temporary:
        temporary.write_text("".join(self._lines))
    self._waiting = False


def _up_to(text: str, step: int) -> list[str]:
  """Returns the complete lines of a text whose "step" is at most `step`."""
  kept = []
  for line in text.splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(f"{line}\n")
    except (ValueError, KeyError, TypeError):
      continue
  return kept


class History:
  """Appends digests of the samples that this process read to history.jsonl.

  A line is {"step": n, "samples": [digest of each sample]}. Process i > 0
  writes history.<i>.jsonl. Reopening a run at an earlier step drops the lines
  of later steps, so the remaining samples are those that led to the parameters.
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
    """Writes all lines; call it before a checkpoint is saved."""
    self._records.flush()


def _digest(arrays: tuple[np.ndarray, ...]) -> str:
  """Returns a digest of the arrays of one sample, 16 hexadecimal digits."""
  found = hashlib.blake2b(digest_size=8)
  for array in arrays:
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


class Work(NamedTuple):
  """The work of a training step, from which its speed follows.

  Attributes:
    clips: number of clips in a batch.
    flops: FLOPs of the model in a step; 0 if unknown.
    peak: peak FLOPs per second of all devices; None if unknown.
  """

  clips: int
  flops: int = 0
  peak: float | None = None

  def speed(self, seconds: float) -> tuple[dict[str, float], str]:
    """Returns the speed of a step, as metrics and as text for a progress line.

    "mfu", the model FLOPs utilisation, is "flops_per_second" over the peak.

    Args:
      seconds: duration of the step.
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
  """Writes the metrics of a run; use one per run, in process 0 only.

  Reopening a run at an earlier step drops the records of later steps, so a
  resumed run leaves the same records as an uninterrupted one.
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
      total_steps: number of steps of the whole run, for the remaining time.
      first_step: number of steps that are done already.

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
      if kind is None:  # Otherwise the error that ended the run is raised.
        raise
    finally:
      if self._spool:
        self._spool.cleanup()

  def flush(self) -> None:
    """Makes sure that all records are in the directory."""
    self._records.flush()
    self._board.flush()
    if self._spool:
      files.upload(self._spool.name, self._directory / "tensorboard")
    self._flushed = time.monotonic()

  def note(self, text: str) -> None:
    """Prints one line without buffering, so that a wait does not look stuck."""
    print(text, flush=True)

  def progress(
    self, step: int, metrics: Mapping[str, float], work: Work
  ) -> None:
    """Prints the progress line and records the metrics with the speed.

    The speed is the mean since the last call or `restart_clock`.

    Args:
      step: number of steps done.
      metrics: values by name.
      work: the work of one step.
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
    """Excludes the time so far (compiling, evaluating) from the next speed."""
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
      step: number of steps done; part of the file name.
      name: the image's name in TensorBoard and in the file name.
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

  tensorboardX's `SummaryWriter` writes in a thread of its own, which ends at
  the first error; ten events later the program would wait for it for ever.
  """

  def __init__(self, directory: str, purge_step: int):
    """Opens a new file, which hides earlier events from `purge_step` on."""
    os.makedirs(directory, exist_ok=True)
    self._path = files.path(directory)
    prefix = os.path.join(directory, "events")
    self._writer = event_file_writer.EventsWriter(prefix)
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=purge_step, session_log=begin)

  def add(self, step: int, value: Any) -> None:
    """Appends the summary `value` of a step."""
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
    """Puts all events on the disk and closes the file."""
    with files.writing(self._path):
      self._writer.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
