"""Contact sheets of reconstructed frames, and strips of generated videos."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import UInt8

from dcvideogen_jax import files

COLUMNS = 8
# This mean difference over the channels, in grey levels of 255, is white in the
# error map.
ERROR_RANGE = 48
# Captions of the rows of a `comparison`.
COMPARISON = (
  "original",
  "reconstruction",
  f"error: mean |difference|, black is 0, white {ERROR_RANGE} of 255",
)
_LONGEST_SIDE = 360
_GAP, _THIN = 8, 2  # pixels
_PAPER = (224, 224, 224)
_TEXT = 14  # pixels
_LINE = _TEXT + 8


class Column(NamedTuple):
  """One column of a contact sheet.

  Attributes:
    title: text above the column.
    images: uint8 `h w 3` in their final size, from top to bottom.
  """

  title: str
  images: tuple[np.ndarray, ...]


def column(title: str, *images: UInt8[np.ndarray, "h w 3"]) -> Column:
  """Makes a column of images of one size, resized for the sheet."""
  return Column(title, tuple(map(_resize, images)))


def comparison(
  title: str,
  original: UInt8[np.ndarray, "h w 3"],
  reconstruction: UInt8[np.ndarray, "h w 3"],
) -> Column:
  """Makes a column of a frame, its reconstruction and an error map.

  The error is computed before resizing.

  Args:
    title: text above the column.
    original: the frame.
    reconstruction: the frame after encoding and decoding.
  """
  difference = np.abs(original.astype(np.int16) - reconstruction)
  error = _heat(difference.mean(axis=-1) / ERROR_RANGE)
  return column(title, original, reconstruction, error)


def write(
  path: str | os.PathLike[str],
  title: str,
  columns: Sequence[Column],
  captions: Sequence[str] = (),
) -> None:
  """Writes a contact sheet as PNG.

  Args:
    path: the file; it ends in .png.
    title: text at the top of the sheet.
    columns: columns from left to right; all images have one size.
    captions: a text above each row of images; none if empty.

  Raises:
    errors.UserError: if the file cannot be written.
  """
  font = PIL.ImageFont.load_default(size=_TEXT)
  height, width = columns[0].images[0].shape[:2]
  row = height + _GAP + (_LINE if captions else 0)
  texts = max(font.getlength(words) for words in (title, *captions))
  size = (
    max(_GAP + len(columns) * (width + _GAP), int(texts) + 2 * _GAP),
    2 * _LINE + row * len(columns[0].images),
  )
  sheet = PIL.Image.new("RGB", size, _PAPER)
  draw = PIL.ImageDraw.Draw(sheet)
  draw.text((_GAP, 4), title, fill="black", font=font)
  for i, words in enumerate(captions):
    draw.text((_GAP, 2 * _LINE + i * row + 4), words, fill="black", font=font)
  for i, shown in enumerate(columns):
    left = _GAP + i * (width + _GAP)
    draw.text((left, _LINE + 4), shown.title, fill="black", font=font)
    for j, image in enumerate(shown.images):
      top = 2 * _LINE + (j + 1) * row - height - _GAP
      sheet.paste(PIL.Image.fromarray(image), (left, top))
  with files.atomic(path) as temporary:
    sheet.save(temporary)


def strips(
  videos: UInt8[np.ndarray, "n t h w 3"], frames: int = 4, across: int = 4
) -> UInt8[np.ndarray, "H W 3"]:
  """Shows some frames of each video, evenly spaced from first to last.

  The frames of a video lie side by side. A video with fewer frames than asked
  for shows all of them.

  Args:
    videos: one or more videos of one size.
    frames: frames to show of each video.
    across: videos in a row.

  Raises:
    ValueError: if there is no video.
  """
  n, t = videos.shape[:2]
  if not n:
    raise ValueError("there are no videos to show")
  picked = np.linspace(0, t - 1, min(frames, t)).round().astype(int)
  strips = [np.concatenate(list(video[picked]), axis=1) for video in videos]
  blank = np.full_like(strips[0], _PAPER[0])
  across = min(across, n)
  strips += [blank] * (-n % across)
  edge = ((0, _THIN), (0, _THIN), (0, 0))
  padded = [np.pad(s, edge, constant_values=_PAPER[0]) for s in strips]
  rows = [
    np.concatenate(padded[i : i + across], axis=1)
    for i in range(0, len(padded), across)
  ]
  return np.concatenate(rows)[:-_THIN, :-_THIN]


def _heat(x: np.ndarray) -> np.ndarray:
  """Maps 0 to 1 to black, red, yellow and white: uint8 with a channel axis."""
  ramps = 3 * x[..., None] - np.arange(3)
  return (255 * np.clip(ramps, 0, 1)).round().astype(np.uint8)


def _resize(image: np.ndarray) -> np.ndarray:
  """Shrinks by averaging, or enlarges by a whole factor, repeating pixels."""
  height, width = image.shape[:2]
  factor = _LONGEST_SIDE / max(height, width)
  if factor >= 1:
    whole = int(factor)
    return image.repeat(whole, axis=0).repeat(whole, axis=1)
  size = (max(1, round(width * factor)), max(1, round(height * factor)))
  resized = PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BOX)
  return np.asarray(resized)
