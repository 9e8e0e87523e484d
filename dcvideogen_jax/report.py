"""Metrics of a run: a progress line, metrics.jsonl and TensorBoard events."""

import json
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
import tensorboardX
from PIL import Image

from dcvideogen_jax import errors, files


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
    self._records = self._directory / "metrics.jsonl"
    drop_after(self._records, first_step)
    self._board = tensorboardX.SummaryWriter(
      str(self._directory / "tensorboard"), purge_step=first_step + 1
    )
    self._mark = (first_step, time.monotonic())

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, *exc: object) -> None:
    self._board.close()

  def note(self, text: str) -> None:
    """Prints one line at once, so that a wait is not read as a hang."""
    print(text, flush=True)

  def progress(
    self, step: int, metrics: Mapping[str, float], clips_per_step: int
  ) -> None:
    """Prints the progress line and records the metrics with their speed.

    The speed is that since the last call or `restart_clock`.
    """
    last, then = self._mark
    now = time.monotonic()
    self._mark = (step, now)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    line, timing = f"step {step}/{self._total}  {shown}", {}
    if step > last:
      seconds = (now - then) / (step - last)
      clips = clips_per_step / seconds
      timing = {"seconds_per_step": seconds, "clips_per_second": clips}
      line += (
        f"  {seconds:.3f} s/step  {clips:.1f} clips/s"
        f"  ETA {_clock((self._total - step) * seconds)}"
      )
    self.note(line)
    self.record(step, {**metrics, **timing})

  def restart_clock(self, step: int) -> None:
    """Leaves what happened so far (compiling, evaluating) out of the speed."""
    self._mark = (step, time.monotonic())

  def record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line to metrics.jsonl and the same to TensorBoard."""
    try:
      with self._records.open("a") as out:
        out.write(json.dumps({"step": step, **metrics}) + "\n")
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)
      self._board.flush()
    except OSError as e:
      raise errors.UserError(
        f"cannot write the metrics in {self._directory}: {e.strerror or e}"
      ) from e

  def image(self, step: int, name: str, pixels: np.ndarray) -> pathlib.Path:
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
    self._board.add_image(name, pixels, step, dataformats="HWC")
    return path


def drop_after(path: pathlib.Path, step: int) -> None:
  """Removes the records of later steps than `step` from a file.

  A line that a kill cut in half goes too.

  Args:
    path: one JSON object with "step" a line; need not exist.
    step: the last one to keep.
  """
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      continue
  with files.atomic(path) as temporary:
    temporary.write_text("".join(f"{line}\n" for line in kept))


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
