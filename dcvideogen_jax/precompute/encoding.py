"""Encodes the clips of a source part by part, on all devices of a process.

Each device has its own copy of the encoders and encodes whole parts. The bytes
of a part therefore do not depend on the number of devices.
"""

import collections
import concurrent.futures
import functools
import os
import pathlib
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import buckets, clip_reading, latents, parts
from dcvideogen_jax.precompute import encoders as encoders_lib
from dcvideogen_jax.sample import layouts

_NO_CAPTION = "it has no caption"
_NOT_FINITE = "its latents are not finite"


class Job(NamedTuple):
  """Which clips are encoded, with which encoders, into which folder.

  Attributes:
    source: a source of clips from `data.clip_sources`.
    paths: paths of the encoders.
    options: how clips are encoded.
    bucket: name of the sizes, as `buckets.find` takes it.
    per_part: clips in a part.
    dtype: name of the dtype in which arrays are stored, from `latents.DTYPES`.
    negative: the negative prompt.
    output: the folder of encoded clips.
    threads: threads that read clips ahead; None is one per core, at most 8 per
      device.
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
    """How many parts the source has."""
    return -(-len(self.source) // self.per_part)

  def clips(self, part: int) -> range:
    """Returns the numbers of the clips of a part."""
    start = part * self.per_part
    return range(start, min(start + self.per_part, len(self.source)))

  def missing(self, numbers: Sequence[int]) -> list[int]:
    """Returns those of the parts that are not written yet."""
    return [n for n in numbers if not parts.is_done(self.output, n)]

  def settings(self) -> dict[str, Any]:
    """Returns everything that the encoded clips depend on, for JSON."""
    return {
      **self.options._asdict(),
      "source": self.source.about(),
      "models": encoders_lib.digests(self.paths),
      "bucket": self.bucket,
      "part": self.per_part,
      "dtype": self.dtype,
      "negative_prompt": self.negative if self.paths.text_encoder else None,
    }


class _Stopped(Exception):
  """Raised in a thread because another thread has failed."""


def run(
  job: Job,
  numbers: Sequence[int],
  done: Callable[[int], Any] = lambda clips: None,
) -> int:
  """Encodes parts, one at a time on each device of this process.

  A part that another process is encoding is left to that process.

  Args:
    job: what is encoded. Its folder must exist, as `parts.begin` makes it.
    numbers: numbers of the parts.
    done: called with how many more clips were encoded or left out.

  Returns:
    How many clips were encoded or left out.

  Raises:
    errors.UserError: if an encoder cannot be loaded, the memory is too small or
      a part cannot be written. A clip that cannot be used is left out.
  """
  clips = 0
  devices = jax.local_devices()
  threads = job.threads or reading_threads(len(devices))
  lock, stopped = threading.Lock(), threading.Event()
  idle: queue.SimpleQueue[_Maker] = queue.SimpleQueue()

  def count(n: int) -> None:
    nonlocal clips
    if stopped.is_set():
      raise _Stopped
    with lock:
      clips += n
      done(n)

  def make(number: int) -> int:
    maker = idle.get()
    try:
      return maker.make(number)
    finally:
      idle.put(maker)

  with (
    concurrent.futures.ThreadPoolExecutor(threads) as readers,
    concurrent.futures.ThreadPoolExecutor(len(devices)) as makers,
  ):
    ahead = -(-2 * threads // len(devices))
    for device in devices:
      idle.put(_Maker(job, device, readers, ahead, count))
    running = [makers.submit(make, number) for number in numbers]
    try:
      cut = sum(x.result() for x in concurrent.futures.as_completed(running))
    finally:
      stopped.set()
      makers.shutdown(wait=False, cancel_futures=True)
  if cut:
    warnings.warn(
      f"{cut} captions were cut to their first {job.options.text_tokens} "
      "tokens",
      stacklevel=2,
    )
  return clips


def reading_threads(devices: int = 1) -> int:
  """Returns how many threads read clips: one per core, at most 8 per device."""
  return min(8 * devices, os.cpu_count() or 1)


class _Maker:
  """Encodes parts on one device, with its own copy of the encoders."""

  def __init__(
    self,
    job: Job,
    device: jax.Device,
    readers: concurrent.futures.Executor,
    ahead: int,
    done: Callable[[int], None],
  ):
    self._job, self._device, self._done = job, device, done
    self._readers, self._ahead = readers, ahead
    with jax.default_device(device):
      self._encoders = encoders_lib.Encoders(job.paths, job.options)
      negative = job.output / latents.NEGATIVE
      if self._encoders.has_text and not negative.exists():
        parts.write_negative(
          job.output, self._encoders.texts([job.negative])[0]
        )
    self._sizes = self._encoders.sizes(job.bucket)

  def make(self, number: int) -> int:
    """Encodes a part unless it exists or another process is encoding it.

    Returns:
      How many captions were cut.
    """
    job, before = self._job, self._encoders.cut
    with (
      jax.default_device(self._device),
      parts.locked(job.output, number) as locked,
    ):
      if locked and not parts.is_done(job.output, number):
        facts = self._encoders.facts()
        with parts.Writer(job.output, number, facts) as writer:
          self._write(writer, job.clips(number))
    return self._encoders.cut - before

  def _write(self, writer: parts.Writer, numbers: Sequence[int]) -> None:
    """Reads clips and encodes them in batches of equal size."""
    waiting = collections.defaultdict(list)
    # Embeddings of the part's captions so far, by caption.
    texts: dict[str, np.ndarray] = {}
    for number, clip in _read_ahead(
      self._load, numbers, self._readers, self._ahead
    ):
      if isinstance(clip, str):
        writer.skip(self._job.source[number].file, clip)
        self._done(1)
        continue
      size = buckets.Size(*clip.video.shape[1:3])
      waiting[size].append(clip)
      if len(waiting[size]) == self._job.options.batch:
        self._encode(writer, size, waiting.pop(size), texts)
    for size in sorted(waiting):
      self._encode(writer, size, waiting[size], texts)

  def _load(self, number: int) -> clip_reading.Loaded | str:
    """Reads a clip, or returns the reason why it cannot be used."""
    source = self._job.source
    try:
      if self._encoders.has_text and not source[number].captions:
        return _NO_CAPTION
      return source.load(number, self._job.options.frames, self._sizes)
    except errors.UserError as e:
      return str(e)

  def _encode(self, writer, size, clips, texts) -> None:
    """Encodes and writes clips of one size; adds new captions to `texts`."""
    encoders, options = self._encoders, self._job.options
    # An incomplete batch repeats its clips, so that one program serves all.
    filled = [clips[i % len(clips)] for i in range(options.batch)]
    pixels = None
    if encoders.image_size is not None:
      pixels = np.stack(
        [x.pixels(encoders.image_size, options.stretch) for x in filled]
      )
    arrays = encoders.clips(np.stack([x.video for x in filled]), pixels)
    if encoders.has_text:
      captions = dict.fromkeys(x for c in clips for x in c.meta["captions"])
      if new := [text for text in captions if text not in texts]:
        texts |= zip(new, encoders.texts(new), strict=True)
    dtype = latents.DTYPES[self._job.dtype]
    for i, clip in enumerate(clips):
      own = {name: values[i] for name, values in arrays.items()}
      if all(np.isfinite(values).all() for values in own.values()):
        if encoders.has_text:
          own["text"] = [texts[x] for x in clip.meta["captions"]]
        cast = functools.partial(np.asarray, dtype=dtype)
        writer.write(str(size), jax.tree.map(cast, own), clip.meta)
      else:
        writer.skip(clip.meta["file"], _NOT_FINITE)
      self._done(1)


def _read_ahead(
  function: Callable[[int], Any], numbers: Sequence[int], pool, ahead: int
) -> Iterator[tuple[int, Any]]:
  """Yields (number, result of the function) in order, computed ahead in `pool`.

  At most `ahead` results wait at a time.
  """
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
