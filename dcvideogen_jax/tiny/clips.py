"""Cuts training and evaluation clips out of whole videos and photographs."""

import collections
import contextlib
import fnmatch
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from dcvideogen_jax import errors, files
from dcvideogen_jax.data import records, stills, video
from dcvideogen_jax.tiny import download, pans

# A cut changes the frame's thumbnail by at least this many grey levels of 255,
# and by at least _CUT_RATIO times the median change of the frames around it.
_CUT_LEVEL = 28.0
_CUT_RATIO = 4.0
# A clip whose `motion` is below this counts as standing still.
STILL = 0.6
# The share of clips that come from photographs, which hold most of the textures
# but get synthetic motion.
_PHOTO_SHARE = 0.3
# Frames of the shorter copies of held-out clips.
_FIRST = 16


class Recipe(NamedTuple):
  """How to cut the clips of a split.

  Attributes:
    clips: approximate number of clips.
    frames: as for `sample`.
    size: as for `sample`.
    short_sides: as for `sample`.
    strides: as for `sample`.
  """

  clips: int
  frames: int
  size: int
  short_sides: tuple[int, ...]
  strides: tuple[int, ...]


RECIPES = {
  "train": Recipe(5000, 24, 96, (96, 128, 160, 208, 256), (1, 2, 3)),
  "heldout": Recipe(48, 64, 64, (64, 96, 144), (1,)),
}


def prepare(
  output: str | os.PathLike[str],
  split: str,
  *,
  count: int | None = None,
  frames: int | None = None,
  size: int | None = None,
  seed: int = 0,
  exclude: Sequence[str] = (),
) -> tuple[int, int]:
  """Downloads the files of a split and writes clips of them.

  Args:
    output: the folder to create. It gets the shards of "train". For "heldout",
      its folder frames64 gets the whole clips, here of 64 frames, and frames16
      their first 16 frames. sources.json beside the shards holds the
      attribution that the licences require.
    split: one of `download.SPLITS`.
    count: approximate number of clips; None takes that of `RECIPES`.
    frames: frames per clip, for "heldout" more than 16; None takes those of
      `RECIPES`.
    size: height and width of a clip in pixels; None takes that of `RECIPES`.
    seed: selects the positions of the clips in the videos.
    exclude: names of files to leave out, which may contain "*" and "?".

  Returns:
    The number of clips, and the number of files that they come from.

  Raises:
    errors.UserError: if the folder is not empty, no file is left, or one cannot
      be downloaded or cut.
  """
  records.require_empty(output)
  output = pathlib.Path(output)
  names = [
    name
    for name in download.names(split)
    if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
  ]
  if not names:
    raise errors.UserError(f"--exclude leaves no file of the {split} split")
  recipe = _recipe(split, count, frames, size)
  taken: collections.Counter[str] = collections.Counter()

  def counted(clips):
    for name, clip in clips:
      taken[name] += 1
      yield clip

  def extra():
    rows = {}
    for name, clips in taken.items():
      entry = download.manifest()[name]
      rows[name] = {
        "clips": clips,
        "sha256": entry.sha256,
        "licence": entry.licence,
        "attribution": entry.attribution,
      }
    table = {"seed": seed, "sources": rows}
    return {"sources.json": json.dumps(table, indent=2, ensure_ascii=False)}

  with contextlib.closing(_cut_all(names, split, recipe, seed)) as clips:
    if split == "train":
      number = records.write_shards(counted(clips), output, extra=extra)
    else:
      whole = list(counted(clips))
      files.make_directory(output)
      folder = output / f"frames{recipe.frames}"
      records.write_shards(whole, folder, extra=extra)
      first = (clip[:_FIRST] for clip in whole)
      folder = output / f"frames{_FIRST}"
      number = records.write_shards(first, folder, extra=extra)
  return number, len(taken)


def _recipe(split, count, frames, size) -> Recipe:
  """Returns the recipe of a split with other numbers, where they are given."""
  recipe = RECIPES[split]
  if count is not None:
    recipe = recipe._replace(clips=count)
  if frames is not None:
    if split == "heldout" and frames <= _FIRST:
      raise errors.UserError(
        f"--frames must be more than {_FIRST} for held-out clips, whose first"
        f" {_FIRST} frames are written too; it is {frames}"
      )
    recipe = recipe._replace(frames=frames)
  if size is not None:
    sides = [side for side in recipe.short_sides if side >= size] or [size]
    recipe = recipe._replace(size=size, short_sides=tuple(sides))
  return recipe


def _cut_all(names, split, recipe, seed) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the clips of a split as (manifest name, clip)."""
  with tqdm.tqdm(names, desc="fetching", unit="file") as bar:
    paths = {name: download.fetch(name) for name in bar}
  quotas = _quotas(list(paths.values()), split, recipe.clips)
  with tqdm.tqdm(total=recipe.clips, desc="cutting", unit="clip") as bar:
    for (name, path), quota in zip(paths.items(), quotas, strict=True):
      bar.set_postfix_str(name, refresh=False)
      for clip in _cut(path, quota, recipe, seed):
        bar.update()
        yield name, clip


def _quotas(paths: list[pathlib.Path], split: str, total: int) -> list[int]:
  """Returns the clips per file: equal for photographs and held-out videos.

  Training videos get clips in proportion to their length.
  """
  photo = np.array([video.is_image(p) for p in paths])
  weight = np.ones(len(paths))
  if split == "train":
    for i in np.flatnonzero(~photo):
      weight[i] = video.probe(paths[i]).frames
  if photo.any() and not photo.all():
    weight[photo] *= _PHOTO_SHARE / weight[photo].sum()
    weight[~photo] *= (1 - _PHOTO_SHARE) / weight[~photo].sum()
  edges = np.r_[0, weight.cumsum() / weight.sum()] * total
  return np.diff(np.rint(edges).astype(int)).tolist()


def _cut(
  path: pathlib.Path, count: int, recipe: Recipe, seed: int
) -> Iterator[np.ndarray]:
  """Yields clips of one file, which depend on its name and the seed only."""
  rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
  shape = recipe.frames, recipe.size, recipe.size
  if video.is_image(path):
    image = stills.read(path)
    for _ in range(count):
      yield pans.ken_burns(image, int(rng.integers(2**31)), *shape)
  else:
    options = recipe._asdict()
    del options["clips"]
    yield from sample(path, rng, count, **options)


def scenes(frames: np.ndarray) -> list[tuple[int, int]]:
  """Splits a video at its cuts.

  Args:
    frames: uint8 (t, h, w, 3).

  Returns:
    (start, stop) of every scene in order; the scenes cover all frames.
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
  """Returns the mean change between neighbouring frames, in levels of 255.

  It is measured on thumbnails, so that sensor noise has little influence.

  Args:
    clip: uint8 (t, h, w, 3).
  """
  if len(clip) < 2:
    return 0.0
  return float(np.abs(np.diff(_thumbnails(clip, 24), axis=0)).mean())


def _thumbnails(frames: np.ndarray, cells: int) -> np.ndarray:
  """Averages blocks of pixels.

  Returns:
    float32 (t, y, x, 3), with y and x from `cells` up to 2 * `cells`, or fewer
    for smaller frames.
  """
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
  """Yields clips from random positions, times, scales and speeds of a video.

  No clip crosses a cut, no two clips are nearly the same, and clips that stand
  still are rare. The whole video is decoded once per scale.

  Args:
    path: a video file.
    rng: source of all random choices.
    count: number of clips to aim for; there are fewer if the video is too short
      or too still for that many different clips.
    frames: frames per clip.
    size: height and width of a clip in pixels.
    short_sides: scales in pixels: the video's shorter side is resized to each
      of them in turn. Scales above the video's own are left out; if all are,
      the smallest is taken.
    strides: each clip takes every n-th frame, n drawn from these strides.
    still_share: probability of keeping a clip that stands still.

  Yields:
    uint8 (frames, size, size, 3).

  Raises:
    errors.UserError: if the video cannot be read, or no scene is long enough.
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
    # Two clips with the same key would show nearly the same.
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
