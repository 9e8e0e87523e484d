"""Where captioned clips come from: files, a TFDS data set, or a made-up world.

All sources give clips alike: the first frames of a video, at 16 per second or
as the file has them, brought to the size of a bucket.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import (
  buckets,
  captions,
  clip_reading,
  probing,
  timing,
  video,
)
from dcvideogen_jax.tiny import world

# What the features of a TFDS data set may be called.
_VIDEO = ("video", "mp4")
_CAPTIONS = ("captions", "caption", "text")
_SCORES = ("scores", "score")
_WORLD_FPS = timing.FPS


class Folder:
  """Video files and their captions; see `captions.read`."""

  def __init__(
    self,
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str] | None = None,
    fps: float | None = timing.FPS,
  ):
    """Reads the captions.

    Args:
      folder: of the videos.
      table: of captions, as `captions.read` takes it.
      fps: frames per second of the clips; None is as the files have them.

    Raises:
      errors.UserError: as `captions.read`.
    """
    timing.require(fps, "fps")
    self._folder = pathlib.Path(folder)
    self._clips = captions.read(folder, table)
    self._fps = fps
    self._seen: dict[str, video.VideoInfo | errors.UserError] = {}

  def __len__(self) -> int:
    return len(self._clips)

  def __getitem__(self, index: int) -> captions.Captioned:
    return self._clips[index]

  def about(self) -> dict[str, Any]:
    """What tells this source from others; the place of the folder does not."""
    digest = hashlib.sha256()
    for clip in self._clips:
      path = self._folder / clip.file
      size = path.stat().st_size if os.path.isfile(path) else None
      digest.update(json.dumps([*clip, size]).encode())
    return {
      "kind": "videos",
      "clips": len(self),
      "sha256": digest.hexdigest(),
      "fps": self._fps,
    }

  def look(self) -> None:
    """Looks at all videos with a caption, so that `place` need not.

    Many at a time, and once for all: see `probing.probe`.
    """
    names = [clip.file for clip in self._clips if clip.captions]
    self._seen = probing.probe(self._folder, names)

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    """Looks at a video; see `clip_reading.place`."""
    file = self._clips[index].file
    return clip_reading.place(
      self._folder / file, frames, sizes, self._fps, self._seen.get(file)
    )

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    """Reads the beginning of a video; see `clip_reading.load`."""
    clip = self._clips[index]
    path = self._folder / clip.file
    return clip_reading.load(
      path, clip, frames, sizes, self._fps, self._seen.get(clip.file)
    )


class TensorFlowDataset:
  """A data set that TFDS wrote in the ArrayRecord format: mp4 bytes and text.

  TFDS reads it without TensorFlow. The features are "video" (or "mp4"), bytes
  of a video file, "caption", "captions" or "text", and maybe "score" or
  "scores".
  """

  def __init__(
    self,
    name: str,
    directory: str | None,
    split: str = "train",
    fps: float | None = timing.FPS,
  ):
    """Opens the data set.

    Args:
      name: as TFDS knows it, "name", "name/config" or "name:version".
      directory: where TFDS keeps data sets; None is its default.
      split: which part, such as "train" or "train[:1000]".
      fps: frames per second of the clips; None is as the files have them.

    Raises:
      errors.UserError: if there is no such data set or it cannot be read.
    """
    timing.require(fps, "fps")
    self._opened = (name, directory, split, fps)
    self._fps = fps
    # Takes seconds, and registers every data set it knows of.
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(name, data_dir=directory)
      self._source = builder.as_data_source(split=split)
      features = builder.info.features
    except Exception as e:  # It raises many kinds, its own and others'.
      reason = (str(e).splitlines() or [type(e).__name__])[0]
      raise errors.UserError(
        f"cannot read the data set {name} in {directory or 'the default place'}"
        f": {reason}"
      ) from e
    self._name = builder.info.full_name
    self._split = split
    self._video, self._captions, self._scores = (
      next((key for key in keys if key in features), None)
      for keys in (_VIDEO, _CAPTIONS, _SCORES)
    )
    if self._video is None:
      raise errors.UserError(
        f"the data set {name} has no feature {' or '.join(_VIDEO)}, only "
        f"{', '.join(features)}"
      )

  def __reduce__(self):
    """Other processes open it themselves."""
    return type(self), self._opened

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> captions.Captioned:
    return self._captioned(index, self._source[index])

  def about(self) -> dict[str, Any]:
    return {
      "kind": "tfds",
      "clips": len(self),
      "name": self._name,
      "split": self._split,
      "fps": self._fps,
    }

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    def place(path):
      return clip_reading.place(path, frames, sizes, self._fps)

    return self._with_file(self._source[index], place)

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    row = self._source[index]
    clip = self._captioned(index, row)

    def load(path):
      return clip_reading.load(path, clip, frames, sizes, self._fps)

    return self._with_file(row, load)

  def _captioned(self, index, row):
    texts = _listed(row[self._captions]) if self._captions else []
    scores = _listed(row[self._scores]) if self._scores else None
    return captions.checked(
      f"{self._split}/{index}",
      [x.decode() if isinstance(x, bytes) else str(x) for x in texts],
      None if scores is None else [float(x) for x in scores],
      f"element {index} of {self._name}: ",
    )

  def _with_file(self, row, function: Callable[[pathlib.Path], Any]) -> Any:
    """A function of the video, for which it becomes a file for a while."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
      file.write(row[self._video])
      file.flush()
      return function(pathlib.Path(file.name))


class World:
  """Clips of `data.world`, in its order; the meta has the scene.

  They are rendered in the size that is asked for, the first of several.
  """

  def __init__(self, count: int, split: str = "train", seed: int = 0):
    """Checks the arguments.

    Raises:
      errors.UserError: for a number below 1 or another split.
    """
    if count < 1:
      raise errors.UserError(f"expected one clip or more, found {count}")
    world.scenes(split)
    self._count, self._split, self._seed = count, split, seed

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> captions.Captioned:
    _, caption, _ = world.clip(self._split, index, self._seed, 1)
    return captions.Captioned(self._name(index), (caption,))

  def about(self) -> dict[str, Any]:
    return {
      "kind": "world",
      "clips": self._count,
      "split": self._split,
      "seed": self._seed,
    }

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    del index
    return clip_reading.Place(sizes[0], frames / _WORLD_FPS, _WORLD_FPS)

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    scene, caption, clip = world.clip(
      self._split, index, self._seed, frames, *sizes[0]
    )
    meta = {
      "file": self._name(index),
      "captions": [caption],
      "scores": None,
      "fps": _WORLD_FPS,
      "scene": scene._asdict(),
    }
    return clip_reading.Loaded(clip, clip[0], meta)

  def _name(self, index):
    return f"world/{self._split}/{self._seed}/{index}"


def _listed(value) -> list:
  return list(value) if isinstance(value, list | np.ndarray) else [value]
