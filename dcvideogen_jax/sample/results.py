"""Writes the results of sampling: a video, a contact sheet and a report."""

import contextlib
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from dcvideogen_jax import clock as clock_lib
from dcvideogen_jax import files, provenance
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.eval import contact_sheet
from dcvideogen_jax.sample import generation, request_list, streams

# The folder of each kind of file, below that of the path.
BESIDE = {".mp4": "", ".png": "", ".json": ""}
_SHEET_FRAMES = 8


def write(
  path: pathlib.Path,
  request: request_list.Request,
  result: generation.Generation | streams.Stream,
  clock: clock_lib.Clock,
  *,
  settings: Mapping[str, Any],
  crf: int = 18,
  interrupted: Callable[[], bool] = lambda: False,
  folders: Mapping[str, str] = BESIDE,
) -> None:
  """Decodes into PATH.mp4 chunk by chunk, with PATH.png and PATH.json.

  The video takes its place after the other files, so where it is, they are.

  Args:
    path: of the files, without a suffix.
    request: gives the title of the contact sheet.
    result: is decoded here; a stream is also generated here.
    clock: its phases are reported in seconds.
    settings: written into the report and the mp4, beside those of the result.
    crf: quality of the mp4; 0 is the best.
    interrupted: called after each chunk; True makes that chunk the last one.
    folders: the folder of each kind of file below that of the path. Without
      .png there is no contact sheet.

  Raises:
    errors.UserError: if a file cannot be written.
    KeyboardInterrupt: if `interrupted` ended the video early; the files are
      complete.
    RuntimeError: if the decoder gives fewer frames than the size says.
  """
  settings = {**settings, "fps": generation.FPS, **result.settings}
  frames, shown, chunks = result.size.frames, [], []
  wanted = set(np.linspace(0, frames - 1, _SHEET_FRAMES).round().astype(int))
  count, since = 0, time.perf_counter()
  with files.atomic_files(path.parent, last=".mp4") as new:

    def place(suffix: str) -> pathlib.Path:
      folder = files.make_directory(new / folders[suffix])
      return pathlib.Path(folder) / f"{path.name}{suffix}"

    with (
      video_files.VideoWriter(
        place(".mp4"),
        fps=generation.FPS,
        crf=crf,
        comment=json.dumps(settings, ensure_ascii=False),
      ) as writer,
      tqdm.tqdm(total=frames, unit="frame", disable=None, leave=False) as bar,
    ):
      for chunk in result.chunks(0):
        with clock.phase("write"):
          writer.write(chunk[0])
        shown += [
          # A view of the frame would keep the whole chunk in memory.
          contact_sheet.column(f"frame {count + i}", frame.copy())
          for i, frame in enumerate(chunk[0])
          if count + i in wanted
        ]
        count += chunk.shape[1]
        bar.update(chunk.shape[1])
        chunks.append(clock_lib.arrival(count, since))
        if interrupted():
          break
    if count < frames and not interrupted():
      raise RuntimeError(
        f"the decoder gave fewer frames, {count}, than {frames}"
      )
    if ".png" in folders:
      with clock.phase("write"):
        title = f"{request.prompt[:90]}  (seed {request.seed})"
        contact_sheet.write(place(".png"), title, shown)
    report = provenance.report(clock, settings=settings, chunks=chunks)
    with files.atomic(place(".json")) as file:
      file.write_text(provenance.to_json(report), encoding="utf-8")
  path = path.parent / folders[".mp4"] / path.name
  if count < frames:
    print(f"{path}.mp4: {count} of {frames} frames", flush=True)
    raise KeyboardInterrupt
  print(f"{path}.mp4: {clock_lib.told(report['seconds'])}", flush=True)


@contextlib.contextmanager
def interruptible(allowed: bool = True) -> Iterator[Callable[[], bool]]:
  """Lets Ctrl-C end a stream after the chunk that is being made.

  A second Ctrl-C ends the program at once. So does the first if `allowed` is
  False or if several processes make a video together. A SIGINT handler other
  than Python's own stays in place.

  Yields:
    A function that returns whether Ctrl-C was pressed.
  """
  default, seen = signal.default_int_handler, []
  if (
    not allowed
    or jax.process_count() > 1
    or signal.getsignal(signal.SIGINT) is not default
  ):
    yield lambda: False
    return

  def stop(number, frame):
    if seen:
      default(number, frame)
    seen.append(True)
    tqdm.tqdm.write("stopping after this chunk; once more stops at once")

  signal.signal(signal.SIGINT, stop)
  try:
    yield lambda: bool(seen)
  finally:
    signal.signal(signal.SIGINT, default)
