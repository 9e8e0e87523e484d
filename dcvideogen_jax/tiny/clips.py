"""Cutting training and evaluation clips out of whole videos."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import video

# In grey levels of 255: a cut changes the 16 x 16 thumbnail by this much at
# least, and by this many times the change of the frames around it.
_CUT_LEVEL = 28.0
_CUT_RATIO = 4.0
# Below this, a clip counts as standing still.
STILL = 0.6


def scenes(frames: np.ndarray) -> list[tuple[int, int]]:
  """Splits a video at its cuts.

  Args:
    frames: uint8 (t, h, w, 3).

  Returns:
    (start, stop) of every scene, in order, together covering all frames.
  """
  small = _thumbnails(frames, 16)
  change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
  starts = [0]
  for i, level in enumerate(change):
    around = np.r_[change[max(0, i - 6) : i], change[i + 1 : i + 7]]
    usual = np.median(around) if around.size else 0.0
    if level > _CUT_LEVEL and level > _CUT_RATIO * usual:
      starts.append(i + 1)
  return list(zip(starts, [*starts[1:], len(frames)], strict=True))


def motion(clip: np.ndarray) -> float:
  """Mean change between neighbouring frames, in grey levels of 255.

  Taken on thumbnails, so that sensor noise counts for little.

  Args:
    clip: uint8 (t, h, w, 3).
  """
  if len(clip) < 2:
    return 0.0
  return float(np.abs(np.diff(_thumbnails(clip, 24), axis=0)).mean())


def _thumbnails(frames: np.ndarray, cells: int) -> np.ndarray:
  """Block means: float32 (t, at most about 2 * cells, same, 3)."""
  _, height, width, _ = frames.shape
  rows, columns = max(1, height // cells), max(1, width // cells)
  height, width = height // rows * rows, width // columns * columns
  small = np.empty(
    (len(frames), height // rows, width // columns, 3), np.float32
  )
  for i, frame in enumerate(frames[:, :height, :width]):
    blocks = frame.reshape(height // rows, rows, width // columns, columns, 3)
    small[i] = blocks.mean((1, 3))
  return small


def sample(
  path: str | os.PathLike[str],
  rng: np.random.Generator,
  count: int,
  *,
  frames: int,
  size: int,
  short_sides: Sequence[int],
  strides: Sequence[int] = (1,),
  still_share: float = 0.1,
) -> Iterator[np.ndarray]:
  """Yields clips from random places, times, scales and speeds of a video.

  No clip crosses a cut, no two are nearly the same, and clips that stand
  still are rare. The whole video is decoded once per scale.

  Args:
    path: a video file.
    rng: decides everything.
    count: how many clips to aim for; fewer come if the video is too short
      or too still for so many different ones.
    frames: frames per clip.
    size: height and width of a clip in pixels.
    short_sides: scales: the video's shorter side is resized to each of these
      in turn; those above the video's own are left out, unless all are.
    strides: a clip takes every stride-th frame, for one of these strides.
    still_share: how likely a clip that stands still is kept.

  Yields:
    uint8 (frames, size, size, 3).

  Raises:
    errors.UserError: if the video cannot be read or no scene is long enough.
  """
  info = video.probe(path)
  native = min(info.height, info.width)
  scales = [s for s in short_sides if s <= native] or [min(short_sides)]
  quotas = np.diff(np.linspace(0, count, len(scales) + 1).round().astype(int))
  for short, quota in zip(scales, quotas, strict=True):
    scaled = [
      max(size, round(side * short / native))
      for side in (info.height, info.width)
    ]
    whole = np.stack(list(video.read_frames(path, size=tuple(scaled))))
    places = [
      (start, stop, stride)
      for start, stop in scenes(whole)
      for stride in strides
      if stop - start > (frames - 1) * stride
    ]
    if not places:
      raise errors.UserError(
        f"{path} has no scene of {frames} frames: {len(whole)} frames in all"
      )
    yield from _sample_scale(
      whole, places, rng, quota, frames, size, still_share
    )


def _sample_scale(whole, places, rng, quota, frames, size, still_share):
  """Draws `quota` different clips from one scale of a video."""
  weights = np.array([b - a - (frames - 1) * s for a, b, s in places], float)
  taken = set()
  for _ in range(12 * quota):
    if len(taken) == quota:
      return
    index = rng.choice(len(places), p=weights / weights.sum())
    start, stop, stride = places[index]
    span = (frames - 1) * stride + 1
    first = rng.integers(start, stop - span + 1)
    top, left = rng.integers(0, np.array(whole.shape[1:3]) - size + 1)
    # Closer than this, two clips would show nearly the same.
    key = (first // 6, stride, top * 6 // size, left * 6 // size)
    if key in taken:
      continue
    clip = whole[
      first : first + span : stride, top : top + size, left : left + size
    ]
    if motion(clip) < STILL and rng.random() >= still_share:
      continue
    taken.add(key)
    yield np.ascontiguousarray(clip)
