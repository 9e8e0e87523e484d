"""Clips as the official evaluation of autoencoders reads and rounds them.

Follows DC-Gen `dc_ai/apps/utils/video.py` and `image.py`, size transform
"TemporalCenterCropSpatialDMCrop", and `dc_ai/staecore/trainer.py` (commit
562077c). Its frames are those that OpenCV decodes, and so are these: the stored
pixels, whatever their aspect, in FFmpeg's default conversion to RGB, by which
colours without a tag are BT.601. `data.video` shows pixels square, takes BT.709
for untagged high definition, and interpolates colours. Interlaced recordings
are deinterlaced here, and not by OpenCV.
"""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import probing
from dcvideogen_jax.data import video as video_files

ROUNDINGS = ("float32", "bfloat16")


def centre(count: int, frames: int) -> list[int]:
  """Returns the numbers of the centre frames of a video, in order.

  A shorter video repeats its first and last frames.

  Args:
    count: frames of the video.
    frames: frames of the clip.
  """
  middle = count // 2
  wanted = np.arange(middle - frames // 2, middle + (frames + 1) // 2)
  return wanted.clip(0, count - 1).tolist()


def crop(
  frame: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
  """Resizes a frame and cuts out its centre.

  Both sides are halved by averaging while both are at least twice what is
  wanted. A bicubic resize then makes one side as long as wanted.

  Args:
    frame: the frame.
    height, width: of the result, in pixels.
  """
  image = PIL.Image.fromarray(frame)
  if image.size == (width, height):
    return frame
  while image.width >= 2 * width and image.height >= 2 * height:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, PIL.Image.Resampling.BOX)
  scale = max(height / image.height, width / image.width)
  size = (round(image.width * scale), round(image.height * scale))
  image = image.resize(size, PIL.Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return np.asarray(image.crop((left, top, left + width, top + height)))


def as_opencv(frame: video_files.Frame) -> UInt8[np.ndarray, "h w 3"]:
  """Returns a frame as OpenCV 5.0 decodes it, upright.

  Args:
    frame: of `data.video.frames`.
  """
  array = frame.decoded.to_ndarray(format="rgb24")
  shape = frame.geometry
  if shape.transposed:
    array = array.transpose(1, 0, 2)
  rows, columns = (-1 if x else 1 for x in (shape.flipped, shape.mirrored))
  return np.ascontiguousarray(array[::rows, ::columns])


def read(
  path: str | os.PathLike[str], frames: int, height: int, width: int
) -> UInt8[np.ndarray, "t h w 3"]:
  """Reads the centre frames of a video at its own frame rate, cropped.

  Args:
    path: the video.
    frames: frames of the clip.
    height, width: of the clip, in pixels.

  Raises:
    errors.UserError: if the video cannot be read.
  """
  return joined(pieces(path, frames, height, width))


def joined(
  parts: Iterable[UInt8[np.ndarray, "_ h w 3"]],
) -> UInt8[np.ndarray, "t h w 3"]:
  """Returns the frames of pieces as one clip."""
  return np.concatenate([*parts])


def pieces(
  path: str | os.PathLike[str],
  frames: int,
  height: int,
  width: int,
  first: bool = False,
) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
  """Yields the frames of `read`, a few at a time.

  Args:
    path, frames, height, width: as for `read`.
    first: whether the clip is the first frames instead of the centre ones, as
      in the official evaluation of long videos. A shorter video is refused.

  Raises:
    errors.UserError: if the video cannot be read, or is too short.
  """
  count = video_files.probe(path).frames
  if first and count < frames:
    raise errors.UserError(
      f"{path} has {count} frames, fewer than the first {frames}"
    )
  # By the number of the frame, how often it is in the clip.
  wanted = collections.Counter(
    range(frames) if first else centre(count, frames)
  )
  last = max(wanted)
  number = -1
  decoded = itertools.islice(video_files.frames(path), last + 1)
  for number, frame in enumerate(decoded):
    if times := wanted[number]:
      yield np.stack([crop(as_opencv(frame), height, width)] * times)
  if number < last:
    raise errors.UserError(
      f"{path} has no frame {number + 1}, although it claims {count} frames"
    )


def to_levels(
  video: Float[np.ndarray, "*shape"], rounding: str
) -> UInt8[np.ndarray, "*shape"]:
  """Converts floats in [-1, 1] to uint8 as the official code does.

  Args:
    video: the floats.
    rounding: one of `ROUNDINGS`. Under "bfloat16" each of the official steps
      rounds to bfloat16, which has whole numbers only from 128 to 255.
  """
  dtype = np.float32 if rounding == "float32" else jnp.bfloat16
  half, most = np.asarray(0.5, dtype), np.asarray(255, dtype)
  unit = video.astype(dtype) * half + half
  levels = most * unit + half
  return levels.astype(np.float32).clip(0, 255).astype(np.uint8)


def round_truth(
  video: UInt8[np.ndarray, "*shape"], rounding: str
) -> UInt8[np.ndarray, "*shape"]:
  """Returns the levels with which the official code compares a clip.

  Args:
    video: the clip.
    rounding: as for `to_levels`; "float32" changes nothing.
  """
  if rounding == "float32":
    return video
  levels = np.arange(256, dtype=np.float32)
  normalised = (levels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
  return to_levels(normalised, rounding)[video]


def listed(path: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Returns the videos of a folder, or of a text file with a path per line.

  Relative paths of a list start at the list's folder.

  Raises:
    errors.UserError: if there is no such folder or file, or it has no videos,
      or one of a list is missing.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = sorted(
      x for x in path.rglob("*") if x.suffix.lower() in probing.VIDEO_SUFFIXES
    )
  elif path.is_file():
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [path.parent / x.strip() for x in lines if x.strip()]
  else:
    raise errors.UserError(f"there is no folder or list {path}")
  if not found:
    raise errors.UserError(f"{path} names no videos")
  for video in itertools.filterfalse(pathlib.Path.is_file, found):
    raise errors.UserError(f"{path} names {video}, which does not exist")
  return found
