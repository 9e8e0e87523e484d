"""Reads and writes clips as ArrayRecord shards, with random access.

A record is a header (magic, t, h, w) and the raw uint8 pixels. ArrayRecord adds
zstd compression and a checksum, so a clip is read back exactly.
"""

import contextlib
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import SupportsIndex

import numpy as np
from array_record.python import array_record_module
from grain import sources

from dcvideogen_jax import errors, files

SUFFIX = ".array_record"
_HEADER = struct.Struct("<4sIII")
_MAGIC = b"CLP1"
# One record per ArrayRecord chunk: reading a clip decompresses no other clip.
_OPTIONS = "group_size:1,zstd:1"


def encode(clip: np.ndarray) -> bytes:
  """Returns the record of a clip.

  Args:
    clip: uint8 (t, h, w, 3).

  Raises:
    TypeError: if the clip is not uint8.
    ValueError: if the clip has another shape or no pixels.
  """
  clip = np.asarray(clip)
  if clip.dtype != np.uint8:
    raise TypeError(f"a clip must be uint8, not {clip.dtype}")
  if clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
    raise ValueError(f"a clip must be (t, h, w, 3), not {clip.shape}")
  return _HEADER.pack(_MAGIC, *clip.shape[:3]) + clip.tobytes()


def decode(record: bytes) -> np.ndarray:
  """Returns the clip of a record: uint8 (t, h, w, 3), read-only.

  Raises:
    ValueError: if the record was not made by `encode` or is truncated.
  """
  if len(record) < _HEADER.size or record[:4] != _MAGIC:
    raise ValueError("the record does not start like a clip")
  shape = (*_HEADER.unpack_from(record)[1:], 3)
  pixels = np.frombuffer(record, np.uint8, offset=_HEADER.size)
  return pixels.reshape(shape)


def require_empty(directory: str | os.PathLike[str]) -> None:
  """Checks that a path does not exist or is an empty folder.

  Raises:
    errors.UserError: if the path is a file or a folder with content, or is in
      an object store.
  """
  if files.is_remote(directory):
    raise errors.UserError(
      f"expected a folder of this machine, found {files.path(directory)}"
    )
  path = pathlib.Path(directory)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise errors.UserError(f"{path} exists and is not an empty folder")


def write_shards(
  clips: Iterable[np.ndarray],
  directory: str | os.PathLike[str],
  *,
  clips_per_shard: int = 256,
  extra: Callable[[], Mapping[str, str]] | None = None,
) -> int:
  """Writes clips into `directory`, which appears only when it is complete.

  Args:
    clips: clips, each uint8 (t, h, w, 3).
    directory: the folder of shards. It must not exist yet, or be empty.
    clips_per_shard: clips in a shard; the last shard may have fewer.
    extra: called after the last clip; returns the names and texts of further
      files of the folder.

  Returns:
    The number of clips.

  Raises:
    errors.UserError: if the directory has content already or cannot be written,
      or there are no clips.
  """
  require_empty(directory)
  directory = pathlib.Path(directory).absolute()
  files.make_directory(directory.parent)
  count, writer = 0, None
  with files.atomic_directory(directory) as temporary:
    for clip in clips:
      with writing(directory):
        if count % clips_per_shard == 0:
          if writer is not None:
            writer.close()
          name = f"clips-{count // clips_per_shard:05d}{SUFFIX}"
          writer = new_writer(temporary / name)
        writer.write(encode(clip))
      count += 1
    if writer is None:
      raise errors.UserError(f"there are no clips to write to {directory}")
    with writing(directory):
      writer.close()
    for name, text in (extra() if extra else {}).items():
      (temporary / name).write_text(text, encoding="utf-8")
  return count


def new_writer(path: pathlib.Path) -> array_record_module.ArrayRecordWriter:
  """Returns a writer of records. Use it and close it within `writing`."""
  return array_record_module.ArrayRecordWriter(str(path), _OPTIONS)


@contextlib.contextmanager
def writing(path: pathlib.Path):
  """Turns errors of the disk and of ArrayRecord into a UserError.

  Raises:
    errors.UserError: if the body fails to write; the message names `path`.
  """
  try:
    yield
  except (OSError, RuntimeError) as e:
    raise errors.UserError(f"cannot write {path}: {e}") from e


class ClipSource:
  """Gives Grain random access to the clips of a folder of shards.

  `source[i]` is {"video": uint8 (t, h, w, 3)}, read-only.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Opens the shards of a folder.

    Raises:
      errors.UserError: if the folder has no shards or no clips, or a shard is
        not an ArrayRecord file.
    """
    self._directory = pathlib.Path(directory)
    shards = sorted(map(str, self._directory.glob(f"*{SUFFIX}")))
    if not shards:
      raise errors.UserError(
        f"{directory} has no *{SUFFIX} files; make them with "
        "`dcvideogen prepare-clips`"
      )
    try:
      self._source = sources.ArrayRecordDataSource(shards)
    except (OSError, RuntimeError) as e:
      raise errors.UserError(
        f"{directory} holds a damaged shard ({one_line(e)})"
      ) from e
    if not len(self._source):
      raise errors.UserError(f"the shards of {directory} hold no clips")

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
    """Reads one clip.

    Raises:
      errors.UserError: if the record is damaged or does not hold a clip.
    """
    try:
      return {"video": decode(self._source[index])}
    except IndexError:
      raise
    except (RuntimeError, ValueError) as e:
      raise errors.UserError(
        f"record {int(index)} of {self._directory} is damaged ({one_line(e)})"
      ) from e

  def __repr__(self) -> str:
    return f"ClipSource({str(self._directory)!r})"


def one_line(error: Exception) -> str:
  """Returns the message of an error on one line."""
  return " ".join(str(error).split())
