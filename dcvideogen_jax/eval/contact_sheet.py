"""Contact sheets: frames, and what became of them in a reconstruction."""

import os
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import UInt8

from dcvideogen_jax import files

COLUMNS = 8
# White in the error map; a mean over the channels, in grey levels of 255.
ERROR_RANGE = 48
_LONGEST_SIDE = 360
_GAP = 8
_PAPER = (224, 224, 224)
_TEXT = 14  # pixels
_LINE = _TEXT + 8


class Column(NamedTuple):
  """One frame of the sheet, of its final size."""

  title: str
  original: UInt8[np.ndarray, "h w 3"]
  reconstruction: UInt8[np.ndarray, "h w 3"]
  error: UInt8[np.ndarray, "h w 3"]


def column(
  title: str,
  original: UInt8[np.ndarray, "h w 3"],
  reconstruction: UInt8[np.ndarray, "h w 3"],
) -> Column:
  """Resizes a pair of frames; the error is taken before that."""
  difference = np.abs(original.astype(np.int16) - reconstruction)
  error = _heat(difference.mean(axis=-1) / ERROR_RANGE)
  return Column(title, *map(_resize, (original, reconstruction, error)))


def write(
  path: str | os.PathLike[str], title: str, columns: list[Column]
) -> None:
  """Writes a PNG with rows original, reconstruction and error map.

  Raises:
    errors.UserError: if the file cannot be written.
  """
  font = PIL.ImageFont.load_default(size=_TEXT)
  height, width = columns[0].original.shape[:2]
  captions = ["original", "reconstruction", "error: mean |difference|  0"]
  bar = _heat(np.linspace(0, 1, 8 * _TEXT))[None].repeat(_TEXT, axis=0)
  needed = [font.getlength(text) for text in (title, captions[-1])]
  needed[-1] += bar.shape[1] + 6 * _TEXT
  size = (
    int(max(_GAP + len(columns) * (width + _GAP), 2 * _GAP + max(needed))),
    2 * _LINE + 3 * (_LINE + height + _GAP),
  )
  sheet = PIL.Image.new("RGB", size, _PAPER)
  draw = PIL.ImageDraw.Draw(sheet)

  def text(x, y, words):
    draw.text((x, y + 4), words, fill="black", font=font)

  text(_GAP, 0, title)
  for row, caption in enumerate(captions):
    top = 2 * _LINE + row * (_LINE + height + _GAP)
    text(_GAP, top, caption)
    for i, shown in enumerate(columns):
      left = _GAP + i * (width + _GAP)
      image = PIL.Image.fromarray(shown[1 + row])
      sheet.paste(image, (left, top + _LINE))
      if row == 0:
        text(left, _LINE, shown.title)
  end = _GAP + int(font.getlength(captions[-1])) + 4
  sheet.paste(PIL.Image.fromarray(bar), (end, top + 5))
  text(end + bar.shape[1] + 4, top, f"{ERROR_RANGE} of 255")
  with files.atomic(path) as temporary:
    sheet.save(temporary)


def write_frames(
  path: str | os.PathLike[str],
  title: str,
  frames: list[tuple[str, UInt8[np.ndarray, "h w 3"]]],
) -> None:
  """Writes a PNG with a row of titled frames.

  Raises:
    errors.UserError: if the file cannot be written.
  """
  font = PIL.ImageFont.load_default(size=_TEXT)
  shown = [(words, _resize(frame)) for words, frame in frames]
  height, width = shown[0][1].shape[:2]
  needed = int(font.getlength(title)) + 2 * _GAP
  size = (
    max(_GAP + len(shown) * (width + _GAP), needed),
    2 * _LINE + height + _GAP,
  )
  sheet = PIL.Image.new("RGB", size, _PAPER)
  draw = PIL.ImageDraw.Draw(sheet)
  draw.text((_GAP, 4), title, fill="black", font=font)
  for i, (words, frame) in enumerate(shown):
    left = _GAP + i * (width + _GAP)
    draw.text((left, _LINE + 4), words, fill="black", font=font)
    sheet.paste(PIL.Image.fromarray(frame), (left, 2 * _LINE))
  with files.atomic(path) as temporary:
    sheet.save(temporary)


def _heat(x: np.ndarray) -> np.ndarray:
  """0 to 1 as black, red, yellow, white: uint8 with a channel axis."""
  ramps = 3 * x[..., None] - np.arange(3)
  return (255 * np.clip(ramps, 0, 1)).round().astype(np.uint8)


def _resize(image: np.ndarray) -> np.ndarray:
  """Shrinks by averaging, or enlarges by a whole factor, pixels visible."""
  height, width = image.shape[:2]
  factor = _LONGEST_SIDE / max(height, width)
  if factor >= 1:
    whole = int(factor)
    return image.repeat(whole, axis=0).repeat(whole, axis=1)
  size = (max(1, round(width * factor)), max(1, round(height * factor)))
  resized = PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BOX)
  return np.asarray(resized)
