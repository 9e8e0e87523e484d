"""Sources of captioned clips: video files, a TFDS data set, a generated world.

All sources have the same methods. A clip is the beginning of a video, at 16
frames per second or at the file's own frame rate, resized to a bucket's size.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
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

# Names that the features of a TFDS data set may have.
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
    """Lists the videos and reads their captions.

    Args:
      folder: the folder of videos.
      table: the table of captions, as `captions.read` takes it.
      fps: frames per second of the clips; None keeps each file's frame rate.

    Raises:
      errors.UserError: for `fps` out of range, and as `captions.read`.
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
    """Identifies the source's content, whatever the path of the folder."""
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
    """Probes all videos with a caption in parallel, so that `place` is fast.

    The results are cached on disk; see `probing.probe`.
    """
    names = [clip.file for clip in self._clips if clip.captions]
    self._seen = probing.probe(self._folder, names)

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    """Probes a clip without reading it; see `clip_reading.place`.

    Args:
      index: number of the clip.
      frames: frames that a clip needs.
      sizes: sizes of the buckets.

    Raises:
      errors.UserError: if the clip cannot be used.
    """
    file = self._clips[index].file
    return clip_reading.place(
      self._folder / file, frames, sizes, self._fps, self._seen.get(file)
    )

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    """Reads a clip; see `clip_reading.load`.

    Args:
      index: number of the clip.
      frames: frames of the clip.
      sizes: sizes of the buckets.

    Raises:
      errors.UserError: if the clip cannot be used.
    """
    clip = self._clips[index]
    path = self._folder / clip.file
    return clip_reading.load(
      path, clip, frames, sizes, self._fps, self._seen.get(clip.file)
    )


class TensorFlowDataset:
  """A data set that TFDS wrote in the ArrayRecord format: mp4 bytes and text.

  TFDS reads it without TensorFlow. Its features are "video" or "mp4", the bytes
  of a video file; "caption", "captions" or "text"; and optionally "score" or
  "scores".

  Attributes:
    name: of the data set, with its configuration and version.
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
      name: name in TFDS: "name", "name/config" or "name:version".
      directory: directory of TFDS's data sets; None is TFDS's default.
      split: split of the data set, such as "train" or "train[:1000]".
      fps: frames per second of the clips; None keeps each file's frame rate.

    Raises:
      errors.UserError: if the data set does not exist, cannot be read or has no
        videos, or `fps` is out of range.
    """
    timing.require(fps, "fps")
    self._opened = (name, directory, split, fps)
    self._fps = fps
    # This import takes seconds and registers all known data sets.
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(name, data_dir=directory)
      self._source = builder.as_data_source(split=split)
      features = builder.info.features
    except Exception as e:  # TFDS raises exceptions of many types.
      reason = (str(e).splitlines() or [type(e).__name__])[0]
      raise errors.UserError(
        f"cannot read the data set {name} in {directory or 'the default place'}"
        f": {reason}"
      ) from e
    self.name = builder.info.full_name
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
    """Pickles the arguments, so that another process opens the data set."""
    return type(self), self._opened

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> captions.Captioned:
    return self._captioned(index, self._source[index])

  def about(self) -> dict[str, Any]:
    """Identifies the data set by its name, version and split."""
    return {
      "kind": "tfds",
      "clips": len(self),
      "name": self.name,
      "split": self._split,
      "fps": self._fps,
    }

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    """Probes a clip without reading it; see `clip_reading.place`.

    Args:
      index, frames, sizes: as for `Folder.place`.
    """

    with self._file(self._source[index]) as path:
      return clip_reading.place(path, frames, sizes, self._fps)

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    """Reads a clip; see `clip_reading.load`.

    Args:
      index, frames, sizes: as for `Folder.load`.
    """
    row = self._source[index]
    clip = self._captioned(index, row)

    with self._file(row) as path:
      return clip_reading.load(path, clip, frames, sizes, self._fps)

  def file(self, index: int) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Returns a context with the path of a temporary file of a video.

    Args:
      index: number of the clip.
    """
    return self._file(self._source[index])

  def _captioned(self, index, row):
    texts = _listed(row[self._captions]) if self._captions else []
    scores = _listed(row[self._scores]) if self._scores else None
    return captions.checked(
      f"{self._split}/{index}",
      [x.decode() if isinstance(x, bytes) else str(x) for x in texts],
      None if scores is None else [float(x) for x in scores],
      f"element {index} of {self.name}: ",
    )

  @contextlib.contextmanager
  def _file(self, row) -> Iterator[pathlib.Path]:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
      file.write(row[self._video])
      file.flush()
      yield pathlib.Path(file.name)


class World:
  """Clips of `tiny.world` in its order, rendered in the first of the sizes.

  The metadata of a clip contains its scene.
  """

  def __init__(self, count: int, split: str = "train", seed: int = 0):
    """Checks the arguments.

    Args:
      count: number of clips.
      split: "train" or "heldout".
      seed: seed of the clips.

    Raises:
      errors.UserError: if the number is below 1 or the split does not exist.
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
    """Identifies the clips by their number, split and seed."""
    return {
      "kind": "world",
      "clips": self._count,
      "split": self._split,
      "seed": self._seed,
    }

  def place(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Place:
    """Returns the place of a clip, in the first of the sizes.

    Args:
      index, frames, sizes: as for `Folder.place`.
    """
    del index
    return clip_reading.Place(sizes[0], frames / _WORLD_FPS, _WORLD_FPS)

  def load(
    self, index: int, frames: int, sizes: Sequence[buckets.Size]
  ) -> clip_reading.Loaded:
    """Renders a clip in the first of the sizes.

    Args:
      index, frames, sizes: as for `Folder.load`.
    """
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
