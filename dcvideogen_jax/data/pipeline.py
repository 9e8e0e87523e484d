"""Endless, shuffled, exactly resumable batches of clips, on Grain.

Every random choice is made from the number of the element it is for, so order
and content are the same for any number of threads.
"""

import bisect
import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import options as options_lib
from dcvideogen_jax.data import probing, records, skipping, video
from dcvideogen_jax.tiny import synthetic, world

VIDEO_SUFFIXES = (
  *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv"),
  *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".gif"),
)
SOURCES = ("records", "videos", "synthetic", "world", "mix")
# What needs no files.
_GENERATED = ("synthetic", "world")
_DEFAULTS = {
  "path": None,
  "parts": ("records", "synthetic"),
  "weights": (0.8, 0.2),
  "split": "train",
  "flip": True,
  "reverse": False,
  "max_stride": 1,
  "max_zoom": 2.0,
}
_REQUIRED = ("source", "frames", "height", "width")


def batches(
  config: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
  num_threads: int = 4,
) -> grain.DatasetIterator:
  """An endless iterator over {"video": uint8 (b, t, h, w, 3)}.

  Videos that are damaged or too short are left out with a warning. A clip of
  another video takes the place of one that turns out to be damaged: the same
  one in every run, named at once and listed when the iterator is closed.

  Its `get_state()` and `set_state(state)` continue at exactly the next batch.
  Call `close()` when done.

  Args:
    config: keys
      source: "records" (a folder of ArrayRecord shards), "videos" (a folder
        of video files, random places and scales), "synthetic" (generated),
        "world" (generated from captions, see `world`), or "mix" (of parts).
      path: the folder, for "records", "videos" and a mix with either.
      frames, height, width: of a clip; a random part of what is read.
      parts: for "mix", the sources; ("records", "synthetic").
      weights: for "mix", how often a clip is of each part; (0.8, 0.2).
      split: for "world", "train" or "heldout" scenes; "train".
      flip: mirror every other clip; True.
      reverse: play every other clip backwards; False.
      max_stride: take every n-th frame, n up to this where clips are long
        enough; 1.
      max_zoom: for "videos", the shorter side is resized to between one and
        this many times what the crop needs, if the file has it; 2.0.
    batch_size: clips per batch of this shard.
    seed: order and augmentation.
    shard_index: this process among `shard_count`; shards are disjoint.
    shard_count: number of processes.
    num_threads: readers; 0 reads in the calling thread.

  Raises:
    errors.UserError: for a bad config, if no video can be used, and while
      iterating when a record turns out to be damaged, or a hundred videos one
      after another.
  """
  options = _checked(config)
  if batch_size <= 0:
    raise errors.UserError(f"batch_size must be positive, not {batch_size}")
  if not 0 <= shard_index < shard_count:
    raise errors.UserError(
      f"shard_index must be in [0, {shard_count}), not {shard_index}"
    )
  if seed < 0:
    raise errors.UserError(f"the data seed must not be negative: {seed}")
  skipped = skipping.Skipped()
  shard = _Shard(seed, shard_index, shard_count, skipped)
  dataset = _BUILDERS[options["source"]](options, shard)
  read = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * batch_size
  )
  found = dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True)
  return skipping.Telling(iter(found), skipped)


@dataclasses.dataclass(frozen=True)
class _Shard:
  """What distinguishes the elements of one process from those of another."""

  seed: int
  index: int
  count: int
  skipped: skipping.Skipped

  @property
  def part(self) -> slice:
    return slice(self.index, None, self.count)

  @property
  def augmentation_seed(self) -> int:
    """Grain numbers elements per process, so each needs its own seed."""
    sequence = np.random.SeedSequence((self.seed, self.index))
    return int(sequence.generate_state(1)[0])


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config with defaults, or one sentence about what is wrong."""
  options = options_lib.checked(config, SOURCES, _REQUIRED, _DEFAULTS)
  _check_mix(options["parts"], options["weights"])
  mixed = options["source"] == "mix"
  sources = options["parts"] if mixed else (options["source"],)
  needy = [source for source in sources if source not in _GENERATED]
  if needy and not options["path"]:
    raise errors.UserError(f"the data source {needy[0]!r} needs a path")
  if "world" in sources and options["split"] not in world.SPLITS:
    raise errors.UserError(
      f"split of the data config must be one of {world.SPLITS}, not "
      f"{options['split']!r}"
    )
  for key in ("frames", "height", "width", "max_stride"):
    if not isinstance(options[key], int) or options[key] <= 0:
      raise errors.UserError(
        f"{key} of the data config must be a positive integer, not "
        f"{options[key]!r}"
      )
  if not options["max_zoom"] >= 1:
    raise errors.UserError(
      f"max_zoom of the data config must be at least 1, not "
      f"{options['max_zoom']}"
    )
  return options


def _check_mix(parts, weights) -> None:
  """Raises an error unless each part has a weight."""
  plain = [source for source in SOURCES if source != "mix"]
  unknown = [part for part in parts if part not in plain]
  if unknown or not parts or len(set(parts)) < len(parts):
    raise errors.UserError(
      f"parts of the data config must be different ones of {plain}, not "
      f"{list(parts)}"
    )
  fit = len(weights) == len(parts)
  if not fit or not all(math.isfinite(w) and w > 0 for w in weights):
    raise errors.UserError(
      f"weights of the data config must be {len(parts)} positive numbers, one "
      f"for each of {list(parts)}, not {weights}"
    )


def video_names(folder: str | os.PathLike[str]) -> list[str]:
  """The videos in a folder and the folders in it, sorted, with "/".

  Links to folders are followed. Hidden files and folders are left out.

  Raises:
    errors.UserError: if the folder is missing or has none.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.UserError(f"{folder} is not a folder of videos")
  found = [
    path.relative_to(folder).as_posix()
    for path in _visible(folder)
    if path.suffix.lower() in VIDEO_SUFFIXES
  ]
  if not found:
    raise errors.UserError(f"{folder} has no {', '.join(VIDEO_SUFFIXES)} files")
  return sorted(found)


def _visible(
  folder: pathlib.Path, above: Sequence[str] = ()
) -> Iterator[pathlib.Path]:
  """Files below a folder; a link to a folder above it is not followed."""
  real = os.path.realpath(folder)
  if real in above:
    return
  for path in folder.iterdir():
    if path.name.startswith("."):
      continue
    if path.is_dir():
      yield from _visible(path, (*above, real))
    else:
      yield path


def _endless(source: Sequence, shard: _Shard, transform) -> grain.MapDataset:
  """This shard's part of the source, shuffled anew in every epoch."""
  if len(range(len(source))[shard.part]) == 0:
    raise errors.UserError(
      f"{source!r} has {len(source)} clips, too few for {shard.count} processes"
    )
  dataset = grain.MapDataset.source(source).seed(shard.augmentation_seed)
  return dataset[shard.part].shuffle().repeat().random_map(transform)


def _records(options, shard):
  source = records.ClipSource(options["path"])
  need = tuple(options[key] for key in ("frames", "height", "width"))
  have = source[0]["video"].shape[:3]
  if any(n > h for n, h in zip(need, have, strict=True)):
    raise errors.UserError(
      f"the clips of {options['path']} are {_by(have)}, smaller than the "
      f"{_by(need)} asked for"
    )
  return _endless(source, shard, _Crop(options))


def _synthetic(options, shard):
  size = [options[key] for key in ("frames", "height", "width")]

  def generate(number):
    return {"video": synthetic.clip((shard.seed, int(number)), *size)}

  return grain.MapDataset.range(2**40)[shard.part].map(generate)


def _world(options, shard):
  size = [options[key] for key in ("frames", "height", "width")]

  def generate(number):
    *_, clip = world.clip(options["split"], int(number), shard.seed, *size)
    return {"video": clip}

  return grain.MapDataset.range(2**40)[shard.part].map(generate)


def _videos(options, shard):
  source = _VideoFiles(options["path"], options["frames"])
  return _endless(source, shard, _ReadVideo(source, options, shard.skipped))


def _mix(options, shard):
  parts = [_BUILDERS[part](options, shard) for part in options["parts"]]
  return grain.MapDataset.mix(parts, list(options["weights"]))


_BUILDERS = {
  "records": _records,
  "videos": _videos,
  "synthetic": _synthetic,
  "world": _world,
  "mix": _mix,
}


def _by(shape) -> str:
  return "x".join(str(n) for n in shape)


class _Crop(grain.transforms.RandomMap):
  """A random part of a clip, perhaps mirrored, backwards, faster."""

  def __init__(self, options):
    self._size = [options[key] for key in ("frames", "height", "width")]
    self._max_stride = options["max_stride"]
    self._flip, self._reverse = options["flip"], options["reverse"]

  def random_map(self, element, rng: np.random.Generator):
    clip = element["video"]
    frames, height, width = self._size
    if any(n > h for n, h in zip(self._size, clip.shape, strict=False)):
      raise errors.UserError(
        f"a clip of {_by(clip.shape[:3])} is smaller than the "
        f"{_by(self._size)} asked for"
      )
    longest = (len(clip) - 1) // max(1, frames - 1)
    stride = int(rng.integers(1, max(1, min(self._max_stride, longest)) + 1))
    span = (frames - 1) * stride + 1
    first, top, left = rng.integers(
      0, np.array(clip.shape[:3]) - (span, height, width) + 1
    )
    flip, reverse = rng.random(2) < 0.5
    clip = clip[
      first : first + span : stride, top : top + height, left : left + width
    ]
    if self._flip and flip:
      clip = clip[:, :, ::-1]
    if self._reverse and reverse:
      clip = clip[::-1]
    return {"video": np.ascontiguousarray(clip)}


class _VideoFiles:
  """A folder's videos; an element is the number of one, for one clip.

  Long files count more often: about once a second of video.
  """

  def __init__(self, path: str | os.PathLike[str], frames: int):
    self._path = pathlib.Path(path)
    names = sorted(video_names(path), key=pathlib.PurePath)
    self.videos: list[tuple[str, video.VideoInfo]] = []
    out = []
    for name, info in probing.probe(path, names).items():
      if isinstance(info, errors.UserError):
        out.append(str(info))
      elif info.frames < frames:
        out.append(
          f"{self._path / name} has {info.frames} frames, fewer than the "
          f"{frames} asked for"
        )
      else:
        self.videos.append((name, info))
    if not self.videos:
      raise errors.UserError(f"no video of {path} can be used: {out[0]}")
    if out:
      warnings.warn(
        f"{len(out)} of {len(names)} videos are left out: "
        f"{skipping.listed(out)}",
        stacklevel=4,
      )
    seconds = [
      max(1, round(i.frames / i.fps)) if i.fps else 1 for _, i in self.videos
    ]
    self._ends = np.cumsum(seconds).tolist()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    return bisect.bisect_right(self._ends, int(index))

  def path(self, number: int) -> pathlib.Path:
    return self._path / self.videos[number][0]

  def __repr__(self) -> str:
    return f"the video folder {self._path}"


class _ReadVideo(grain.transforms.RandomMap):
  """A clip from a random time, at a random scale, of a file."""

  def __init__(self, source, options, skipped):
    self._source, self._options, self._skipped = source, options, skipped
    self._crop = _Crop(options)

  def random_map(self, element, rng: np.random.Generator):
    return skipping.first(
      skipping.candidates(range(len(self._source.videos)), int(element)),
      self._read,
      lambda number: str(self._source.path(number)),
      rng,
      self._skipped,
    )

  def _read(self, number: int, rng: np.random.Generator):
    path, info = self._source.path(number), self._source.videos[number][1]
    frames = self._options["frames"]
    fits = (info.frames - 1) // max(1, frames - 1)
    stride = rng.integers(1, max(1, min(self._options["max_stride"], fits)) + 1)
    span = int((frames - 1) * stride + 1)
    first = int(rng.integers(0, info.frames - span + 1))
    # The crop decides everything else; it must not draw a stride of its own
    # from frames that were not read.
    found = video.read_frames(
      path,
      start=first / info.fps if info.fps else 0.0,
      max_frames=span,
      size=self._scale(info, rng),
    )
    clip = np.stack(list(found)[::stride])
    if len(clip) < frames:
      clip = np.concatenate([clip, clip[-1:].repeat(frames - len(clip), 0)])
    return self._crop.random_map({"video": clip[:frames]}, rng)

  def _scale(self, info: video.VideoInfo, rng) -> tuple[int, int]:
    """(height, width) to read at: the aspect ratio kept, the crop inside."""
    height, width = self._options["height"], self._options["width"]
    least = max(height / info.height, width / info.width)
    most = max(least, min(1.0, least * self._options["max_zoom"]))
    scale = math.exp(rng.uniform(math.log(least), math.log(most)))
    return (
      max(height, round(info.height * scale)),
      max(width, round(info.width * scale)),
    )
