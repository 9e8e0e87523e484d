"""Clips without captions, cut from files at random places or generated."""

import bisect
import math
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import options as options_lib
from dcvideogen_jax.data import probing, records, skipping, video
from dcvideogen_jax.tiny import synthetic, world

SOURCES = ("records", "videos", "synthetic", "world", "mix")
# Sources that need no files.
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
  "images": 0.0,
  "image_frames": 1,
}
_REQUIRED = ("source", "frames", "height", "width")


def elements(
  config: Mapping[str, Any],
  process: options_lib.Process,
  skipped: skipping.Skipped,
) -> grain.MapDataset:
  """Returns the endless clips of a process: {"video": uint8 (t, h, w, 3)}.

  Args:
    config: keys
      source: "records" (a folder of ArrayRecord shards), "videos" (a folder
        of video files, cut at random times and scales), "synthetic"
        (generated), "world" (generated from captions, see `tiny.world`), or
        "mix" (several of these).
      path: the folder, for "records", "videos" and a mix with either.
      frames, height, width: size of a clip, cut from a larger clip at random.
      parts: for "mix", the sources; ("records", "synthetic").
      weights: for "mix", the share of clips from each source; (0.8, 0.2).
      split: for "world", "train" or "heldout" scenes; "train".
      flip: mirror a clip with probability 1/2; True.
      reverse: play a clip backwards with probability 1/2; False.
      max_stride: take every n-th frame, with n drawn from 1 to this number, or
        less where a clip is too short; 1.
      max_zoom: for "videos", the frame is resized to a random scale, from the
        smallest that covers the crop to this many times as much, but not above
        the file's own size; 2.0.
      images, image_frames: see `batches`, which reads them.
    process: the process that reads.
    skipped: records the videos that cannot be read.

  Raises:
    errors.UserError: for a bad config, or if no video can be used.
  """
  options = _checked(config)
  if options["source"] != "mix":
    return _BUILDERS[options["source"]](options, process, skipped)
  return grain.MapDataset.mix(
    [_BUILDERS[part](options, process, skipped) for part in options["parts"]],
    list(options["weights"]),
  )


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config with defaults, after checking it."""
  options = options_lib.checked(
    config,
    SOURCES,
    _REQUIRED,
    _DEFAULTS,
    positive=("frames", "height", "width", "max_stride", "image_frames"),
  )
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
  if not options["max_zoom"] >= 1:
    raise errors.UserError(
      f"max_zoom of the data config must be at least 1, not "
      f"{options['max_zoom']}"
    )
  return options


def _check_mix(parts, weights) -> None:
  """Checks that the parts are different sources and that each has a weight."""
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


def _endless(
  source: Sequence, process: options_lib.Process, transform
) -> grain.MapDataset:
  """Returns the process's shard of the source, shuffled anew in each epoch."""
  if len(range(len(source))[process.shard]) == 0:
    raise errors.UserError(
      f"{source!r} has {len(source)} clips, too few for {process.count} "
      "processes"
    )
  dataset = grain.MapDataset.source(source).seed(process.grain_seed())
  return dataset[process.shard].shuffle().repeat().random_map(transform)


def _records(options, process, skipped):
  del skipped
  source = records.ClipSource(options["path"])
  need, have = _size(options), source[0]["video"].shape[:3]
  if any(n > h for n, h in zip(need, have, strict=True)):
    raise errors.UserError(
      f"the clips of {options['path']} are {_by(have)}, smaller than the "
      f"{_by(need)} asked for"
    )
  return _endless(source, process, _Crop(options))


def _videos(options, process, skipped):
  source = _VideoFiles(options["path"], options["frames"])
  return _endless(source, process, _ReadVideo(source, options, skipped))


def _synthetic(options, process, skipped):
  del skipped

  def clip(number):
    return synthetic.clip((process.seed, int(number)), *_size(options))

  return _generated(clip, process)


def _world(options, process, skipped):
  del skipped

  def clip(number):
    size = _size(options)
    return world.clip(options["split"], int(number), process.seed, *size)[2]

  return _generated(clip, process)


def _generated(clip, process):
  numbers = grain.MapDataset.range(2**40)[process.shard]
  return numbers.map(lambda number: {"video": clip(number)})


_BUILDERS = {
  "records": _records,
  "videos": _videos,
  "synthetic": _synthetic,
  "world": _world,
}


def _size(options) -> tuple[int, int, int]:
  return options["frames"], options["height"], options["width"]


def _by(shape) -> str:
  return "x".join(str(n) for n in shape)


class _Crop(grain.transforms.RandomMap):
  """Cuts a random part of a clip, with a random stride, flip and direction."""

  def __init__(self, options):
    self._size = _size(options)
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
  """The videos of a folder; an element is the number of a video.

  A video has about one element for each second, so that long videos are drawn
  more often.
  """

  def __init__(self, path: str | os.PathLike[str], frames: int):
    self._path = pathlib.Path(path)
    names = sorted(probing.video_names(path), key=pathlib.PurePath)
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
    if not 0 <= index < len(self):
      raise IndexError(f"{self} has {len(self)} elements, found index {index}")
    return bisect.bisect_right(self._ends, int(index))

  def path(self, number: int) -> pathlib.Path:
    return self._path / self.videos[number][0]

  def __repr__(self) -> str:
    return f"the video folder {self._path}"


class _ReadVideo(grain.transforms.RandomMap):
  """Reads a clip of a video file at a random time and a random scale."""

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
    # The stride is applied here, to exactly the frames that are read. Left with
    # `frames` frames, `_Crop` can only draw a stride of 1.
    pictures = video.read_frames(
      path,
      start=first / info.fps if info.fps else 0.0,
      max_frames=span,
      size=self._scale(info, rng),
    )
    clip = np.stack(list(pictures)[::stride])
    if len(clip) < frames:
      clip = np.concatenate([clip, clip[-1:].repeat(frames - len(clip), 0)])
    return self._crop.random_map({"video": clip[:frames]}, rng)

  def _scale(self, info: video.VideoInfo, rng) -> tuple[int, int]:
    """Draws the (height, width) to read at.

    The aspect ratio is kept and the crop fits inside.
    """
    height, width = self._options["height"], self._options["width"]
    least = max(height / info.height, width / info.width)
    most = max(least, min(1.0, least * self._options["max_zoom"]))
    scale = math.exp(rng.uniform(math.log(least), math.log(most)))
    return (
      max(height, round(info.height * scale)),
      max(width, round(info.width * scale)),
    )
