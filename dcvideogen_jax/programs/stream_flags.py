"""What `launch.sample --stream` is asked for: its flags and given frames."""

import collections
import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables, timing
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import pipeline, streams

_STREAM = flags.DEFINE_bool(
  "stream",
  False,
  "Make the video chunk by chunk, each seeing those before it, and write it as"
  " it is made: any number of --frames.",
)
_WINDOW = flags.DEFINE_integer(
  "window",
  None,
  "Of a stream: chunks back that a chunk sees, for memory that does not grow."
  " Unset: all, and programs are compiled for every chunk.",
)
_SINK = flags.DEFINE_integer(
  "sink", 0, "Of a stream: chunks at the very beginning that are seen besides."
)
_CHUNK = flags.DEFINE_integer(
  "chunk",
  None,
  "Of a stream: latent frames of a chunk. Unset: as the transformer learnt it."
  " One that was trained on whole clips needs it, and makes worse videos.",
)
_CLEAN_LEVEL = flags.DEFINE_float(
  "clean_level",
  0.0,
  "Of a stream: noise level at which finished chunks are seen.",
)
_CONTINUE_FROM = flags.DEFINE_string(
  "continue_from",
  None,
  "Of a stream: a video to go on from, stretched to the size and taken at 16"
  " frames per second (--continue_fps). Its last whole chunks that the first"
  " new one sees come first in the file, then the --frames.",
)
_CONTINUE_FPS = flags.DEFINE_string(
  "continue_fps",
  f"{timing.FPS:g}",
  'Of --continue_from: frames per second, taken by their times; "file" takes'
  " them as they come.",
)
_PROMPT_AT = flags.DEFINE_multi_string(
  "prompt_at",
  [],
  'Of a stream: "NUMBER:TEXT", a new prompt from that chunk on; 0, the first'
  " that is made, has --prompt.",
)

_ONLY_STREAMS = (
  _WINDOW,
  _SINK,
  _CHUNK,
  _CLEAN_LEVEL,
  _CONTINUE_FROM,
  _CONTINUE_FPS,
  _PROMPT_AT,
)


def asked() -> bool:
  """Whether videos are to be streams."""
  return bool(_STREAM.value)


def continues() -> bool:
  """Whether they go on from a video, which then gives the first frame."""
  return _CONTINUE_FROM.value is not None


def check(others: Mapping[str, Any]) -> None:
  """Refuses, before anything is loaded, flags that do not fit.

  Args:
    others: flags that streams do not have, by name; None or False is unset.

  Raises:
    errors.UserError: says what is wrong.
  """
  if not asked():
    for flag in _ONLY_STREAMS:
      if flag.value != flag.default:
        raise errors.UserError(f"--{flag.name} belongs to --stream")
    return
  if wrong := [name for name, value in others.items() if value]:
    raise errors.UserError(f"--{wrong[0]} and --stream do not go together")
  streams.check(_WINDOW.value, _SINK.value, _CLEAN_LEVEL.value)
  if _CHUNK.value is not None and _CHUNK.value < 1:
    raise errors.UserError(
      f"--chunk is 1 latent frame or more, found {_CHUNK.value}"
    )
  prompts("")
  timing.parse(_CONTINUE_FPS.value, "--continue_fps")
  if continues():
    video_files.probe(_CONTINUE_FROM.value)


def settings() -> dict[str, Any]:
  """What a report says besides; nothing of other videos."""
  if not asked():
    return {}
  return {
    flag.name: flag.value if continues() else None
    for flag in (_CONTINUE_FROM, _CONTINUE_FPS)
  }


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
  """Lets Ctrl-C end a stream after the chunk that is being made.

  A second one ends the program at once, as the first does for other videos and
  where several processes make one together.

  Yields:
    Whether there was one.
  """
  default, seen = signal.default_int_handler, []
  if (
    not asked()
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


def make(
  made: pipeline.DCVideoGen, c: Any, prompt: str, **options: Any
) -> streams.Stream:
  """The stream of a request, with a bar of its steps.

  Args:
    made: the model.
    c: the config.
    prompt: of the first chunk.
    **options: of `streams.start`.

  Raises:
    errors.UserError: as `streams.start`.
  """
  per_chunk = streams.frames_of_chunk(made, _CHUNK.value)
  total = -(-c.frames // per_chunk) * c.steps

  def on_step(i, x):
    del x
    bar.update()
    if i + 1 == total:
      bar.close()

  if continues():
    options["given"] = _read(made, c, per_chunk)
    options["height"], options["width"] = options["given"].shape[1:3]
  stream = made.generate_stream(
    prompts(prompt),
    window=_WINDOW.value,
    sink=_SINK.value,
    chunk=_CHUNK.value,
    clean_level=_CLEAN_LEVEL.value,
    on_step=on_step,
    **options,
  )
  bar = tqdm.tqdm(
    total=total, unit="step", disable=None, leave=False, position=1
  )
  return stream


def prompts(first: str) -> dict[int, str]:
  """The texts of a stream by the number of the chunk from which they hold.

  Raises:
    errors.UserError: for a --prompt_at that cannot be read.
  """
  found = {0: first}
  for item in _PROMPT_AT.value:
    number, colon, text = item.partition(":")
    if not colon or not number.strip().isdecimal():
      raise errors.UserError(f"--prompt_at must be NUMBER:TEXT, found {item!r}")
    if int(number) in found:
      raise errors.UserError(
        f"--prompt_at: chunk {int(number)} has a prompt already, found {item!r}"
      )
    found[int(number)] = tables.require_text(text.strip(), "--prompt_at")
  return found


def _read(made, c, per_chunk) -> UInt8[np.ndarray, "t h w 3"]:
  """The last whole chunks of a video, as far as they are seen."""
  path = _CONTINUE_FROM.value
  fps = timing.parse(_CONTINUE_FPS.value, "--continue_fps")
  info = video_files.probe(path)
  first = next(video_files.frames(path)).rgb()
  size = made.size(c.frames, c.height, c.width, c.area, first)
  most = None
  if _WINDOW.value is not None:
    most = (_SINK.value + _WINDOW.value) * per_chunk
  frames = collections.deque(
    (
      frame.rgb((size.height, size.width))
      for frame in timing.frames(path, info, fps)
    ),
    maxlen=most,
  )
  if len(frames) < per_chunk:
    raise errors.UserError(
      f"{path} has {len(frames)} frames{timing.rate(info, fps)}, fewer than "
      f"the {per_chunk} of a chunk"
    )
  timing.tell(path, info, fps)
  return np.stack([*frames][len(frames) % per_chunk :])
