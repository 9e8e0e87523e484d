"""Encodes the clips of a source, part by part, on all devices of a process.

Every device has its own copy of the encoders and makes whole parts, so that the
bytes of a part do not depend on how many devices there are.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import pathlib
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets, clip_reading, latents, parts
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.sample import layouts

_NO_CAPTION = "it has no caption"
_NOT_FINITE = "its latents are not finite"
_POLL = 0.5  # seconds


class Job(NamedTuple):
  """What a process needs to know; can be pickled.

  Attributes:
    source: of clips, out of `data.clip_sources`.
    paths: of the encoders.
    options: of encoding.
    bucket: a name for `buckets.find`.
    per_part: clips of a part.
    dtype: that arrays are stored in, of `latents.DTYPES`.
    negative: the negative prompt.
    output: the folder, which is begun.
    threads: that read clips ahead; None is one per core, at most 8 per device.
  """

  source: Any
  paths: layouts.Paths
  options: encoders_lib.Options
  bucket: str
  per_part: int
  dtype: str
  negative: str
  output: pathlib.Path
  threads: int | None

  @property
  def count(self) -> int:
    """Parts of the whole."""
    return -(-len(self.source) // self.per_part)

  def clips(self, part: int) -> range:
    """Numbers of the clips of a part."""
    start = part * self.per_part
    return range(start, min(start + self.per_part, len(self.source)))


class _Stopped(Exception):
  """Another thread has failed."""


def run(
  job: Job,
  numbers: Iterable[int],
  ready: Callable[[], None],
  done: Callable[[int], None],
) -> None:
  """Makes parts in this process, one at a time on each of its devices.

  Parts that another process makes at the same time are left to it.

  Args:
    job: what to do.
    numbers: of the parts, in order; may wait for more.
    ready: called once everything is loaded.
    done: called with the number of clips that were encoded or left out.

  Raises:
    errors.UserError: for anything but a clip that cannot be used.
  """
  devices = jax.local_devices()
  encoders = []
  for device in devices:
    with jax.default_device(device):
      encoders.append(encoders_lib.Encoders(job.paths, job.options))
  if encoders[0].has_text and not (job.output / latents.NEGATIVE).exists():
    parts.write_negative(job.output, encoders[0].texts([job.negative])[0])
  negative_cut = encoders[0].cut
  ready()
  numbers, lock, stopped = iter(numbers), threading.Lock(), threading.Event()
  threads = job.threads or reading_threads(len(devices))

  def count(clips: int) -> None:
    if stopped.is_set():
      raise _Stopped
    with lock:
      done(clips)

  def make(device: jax.Device, encoders: encoders_lib.Encoders) -> None:
    sizes = encoders.sizes(job.bucket)
    ahead = -(-2 * threads // len(devices))
    while True:
      with lock:
        number = next(numbers, None)
      if number is None:
        return
      with (
        jax.default_device(device),
        parts.locked(job.output, number) as locked,
      ):
        if locked and not parts.is_done(job.output, number):
          writer = parts.Writer(job.output, number, encoders.facts())
          with writer:
            part = _Part(job, encoders, sizes, writer, count)
            part.run(job.clips(number), readers, ahead)

  with (
    concurrent.futures.ThreadPoolExecutor(threads) as readers,
    concurrent.futures.ThreadPoolExecutor(len(devices)) as makers,
  ):
    running = [
      makers.submit(make, *both) for both in zip(devices, encoders, strict=True)
    ]
    try:
      for future in concurrent.futures.as_completed(running):
        future.result()
    finally:
      stopped.set()
  # The negative prompt is no caption.
  if cut := sum(each.cut for each in encoders) - negative_cut:
    tokens = job.options.text_tokens
    warnings.warn(
      f"{cut} captions were cut to their first {tokens} tokens",
      stacklevel=2,
    )


def reading_threads(devices: int = 1) -> int:
  """One per core, at most 8 for each device."""
  return min(8 * devices, os.cpu_count() or 1)


class _Part:
  """One part in the making: clips wait until a batch of their size is full."""

  def __init__(self, job, encoders, sizes, writer, done):
    self._job, self._encoders, self._sizes = job, encoders, sizes
    self._writer, self._done = writer, done
    self._waiting = collections.defaultdict(list)
    self._known: dict[str, np.ndarray] = {}

  def run(self, numbers: Sequence[int], readers, ahead: int) -> None:
    for number, loaded in _read_ahead(self._load, numbers, readers, ahead):
      if isinstance(loaded, str):
        self._skip(self._job.source[number].file, loaded)
        continue
      size = buckets.Size(*loaded.video.shape[1:3])
      self._waiting[size].append(loaded)
      if len(self._waiting[size]) == self._job.options.batch:
        self._encode(size)
    for size in sorted(self._waiting):
      self._encode(size)

  def _load(self, number: int) -> clip_reading.Loaded | str:
    """A clip, or why it cannot be used."""
    source = self._job.source
    try:
      if self._encoders.has_text and not source[number].captions:
        return _NO_CAPTION
      return source.load(number, self._job.options.frames, self._sizes)
    except errors.UserError as e:
      return str(e)

  def _skip(self, file: str, reason: str) -> None:
    self._writer.skip(file, reason)
    self._done(1)

  def _encode(self, size: buckets.Size) -> None:
    """Encodes and writes the clips that wait for a size."""
    clips = self._waiting.pop(size)
    options = self._job.options
    # A part's last batch is filled up: one program for all.
    filled = [clips[i % len(clips)] for i in range(options.batch)]
    pixels = None
    if self._encoders.image_size is not None:
      pixels = np.stack(
        [x.pixels(self._encoders.image_size, options.stretch) for x in filled]
      )
    arrays = self._encoders.clips(np.stack([x.video for x in filled]), pixels)
    texts = self._texts(clips)
    dtype = latents.DTYPES[self._job.dtype]
    for i, clip in enumerate(clips):
      own = {name: values[i] for name, values in arrays.items()}
      if not all(np.isfinite(values).all() for values in own.values()):
        self._skip(clip.meta["file"], _NOT_FINITE)
        continue
      own = {name: values.astype(dtype) for name, values in own.items()}
      if texts is not None:
        own["text"] = [texts[x].astype(dtype) for x in clip.meta["captions"]]
      self._writer.write(str(size), own, clip.meta)
      self._done(1)

  def _texts(self, clips) -> dict[str, np.ndarray] | None:
    """Embeddings of the captions of clips, and of those before in the part."""
    if not self._encoders.has_text:
      return None
    new = {text: None for clip in clips for text in clip.meta["captions"]}
    new = [text for text in new if text not in self._known]
    if new:
      found = self._encoders.texts(new)
      self._known |= dict(zip(new, found, strict=True))
    return self._known


def _read_ahead(
  function: Callable[[int], Any], numbers: Sequence[int], pool, ahead: int
) -> Iterator[tuple[int, Any]]:
  """(number, function of it) in order, so many of them computed ahead."""
  waiting = collections.deque()
  try:
    for number in numbers:
      waiting.append((number, pool.submit(function, number)))
      if len(waiting) > ahead:
        number, future = waiting.popleft()
        yield number, future.result()
    while waiting:
      number, future = waiting.popleft()
      yield number, future.result()
  finally:
    for _, future in waiting:
      future.cancel()


# --- several processes -------------------------------------------------------


def run_workers(
  job: Job,
  numbers: Sequence[int],
  workers: int,
  ready: Callable[[], None],
  done: Callable[[int], None],
) -> None:
  """As `run`, in so many processes, which take one part after another.

  On GPUs, process i uses GPU i.

  Raises:
    errors.UserError: what one of them raised, or that one was killed.
  """
  context = multiprocessing.get_context("spawn")
  tasks, messages = context.Queue(), context.Queue()
  for number in [*numbers, *[None] * workers]:
    tasks.put(number)
  # They are told by the environment what this process was told otherwise.
  cache = jax.config.jax_compilation_cache_dir
  processes = []
  try:
    for i in range(workers):
      os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
      os.environ["JAX_CUDA_VISIBLE_DEVICES"] = str(i)
      process = context.Process(
        target=_work, args=(job, tasks, messages), daemon=True
      )
      process.start()
      processes.append(process)
    _follow(processes, messages, ready, done)
  finally:
    for process in processes:
      process.terminate()
    for process in processes:
      process.join()


def _follow(processes, messages, ready, done) -> None:
  """Passes on what the processes say until all have ended."""
  left = len(processes)
  while left:
    try:
      kind, value = messages.get(timeout=_POLL)
    except queue.Empty:
      dead = [p.exitcode for p in processes if p.exitcode]
      if dead:
        raise errors.UserError(
          f"a worker process ended with code {dead[0]}, maybe for want of "
          "memory: the same command goes on where it was"
        ) from None
      continue
    if kind == "error":
      raise errors.UserError(value)
    if kind == "bug":
      raise RuntimeError(f"a worker process failed:\n{value}")
    if kind == "ready":
      ready()
    elif kind == "done":
      done(value)
    else:
      left -= 1


def _work(job: Job, tasks, messages) -> None:
  """What a worker process runs."""
  # The parent is interrupted too, and ends this process.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_die_with_parent, daemon=True).start()
  try:
    run(
      job,
      iter(tasks.get, None),
      lambda: messages.put(("ready", None)),
      lambda count: messages.put(("done", count)),
    )
    messages.put(("end", None))
  except errors.UserError as e:
    messages.put(("error", str(e)))
  except Exception:
    messages.put(("bug", traceback.format_exc()))


def _die_with_parent() -> None:
  """Or a killed program would leave processes that go on writing."""
  multiprocessing.parent_process().join()
  os._exit(1)


class Rate:
  """Clips per second since the encoders were loaded."""

  def __init__(self):
    self._start: float | None = None
    self.clips = 0

  def ready(self) -> None:
    self._start = self._start or time.perf_counter()

  def done(self, count: int) -> None:
    self.clips += count

  @property
  def seconds(self) -> float:
    return 0.0 if self._start is None else time.perf_counter() - self._start
