"""Prompts that change in a stream, and the video that it goes on from."""

import collections
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables, timing
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import sizes


def prompts(first: str, changes: Iterable[str]) -> dict[int, str]:
  """The texts of a stream by the number of the chunk from which they hold.

  Args:
    first: holds from the first chunk that is made, number 0.
    changes: each "NUMBER:TEXT".

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
  """The last whole chunks of a video, as far as they are seen.

  Args:
    path: the video.
    fps: frames per second, taken by their times; None takes them as they come.
    size: to stretch them to.
    per_chunk: frames of a chunk.
    most: chunks that the first new one sees; None is all of them.

  Raises:
    errors.UserError: if the video is damaged or has not one whole chunk.
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
