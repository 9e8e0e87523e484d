"""Prompts that change in a stream, and the video that a stream continues."""

import collections
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables, timing
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import sizes


def prompts(first: str, changes: Iterable[str]) -> dict[int, str]:
  """Parses the prompts of a stream, by the chunk from which they hold.

  Args:
    first: the prompt from the first new chunk on, number 0.
    changes: further prompts, each "NUMBER:TEXT".

  Raises:
    errors.UserError: for a change that cannot be read.
  """
  found = {0: first}
  for item in changes:
    number, colon, text = item.partition(":")
    if not colon or not number.strip().isdecimal():
      raise errors.UserError(f"--prompt_at must be NUMBER:TEXT, found {item!r}")
    if int(number) in found:
      raise errors.UserError(
        f"--prompt_at: chunk {int(number)} has a prompt already, found {item!r}"
      )
    found[int(number)] = tables.require_text(text.strip(), "--prompt_at")
  return found


def frames(
  path: str,
  fps: float | None,
  size: sizes.Size,
  per_chunk: int,
  most: int | None,
) -> UInt8[np.ndarray, "t h w 3"]:
  """Reads the last whole chunks of a video, as many as a new chunk sees.

  Args:
    path: the video.
    fps: rate in frames per second, at which frames are picked by their times;
      None takes every frame.
    size: gives the height and width to which frames are stretched.
    per_chunk: frames of a chunk.
    most: chunks that the first new chunk sees; None is all of them.

  Raises:
    errors.UserError: if the video is damaged or shorter than one chunk.
  """
  info = video_files.probe(path)
  found = collections.deque(
    (
      frame.rgb((size.height, size.width))
      for frame in timing.frames(path, info, fps)
    ),
    maxlen=None if most is None else most * per_chunk,
  )
  if len(found) < per_chunk:
    raise errors.UserError(
      f"{path} has {len(found)} frames{timing.rate(info, fps)}, fewer than "
      f"the {per_chunk} of a chunk"
    )
  timing.tell(path, info, fps)
  return np.stack([*found][len(found) % per_chunk :])
