"""Reads photographs and animations as uint8 sRGB arrays, with Pillow."""

import contextlib
import io
import os
import pathlib
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import containers, pixels

# The formats that are read. Some other formats of Pillow run programs, and some
# are videos that Pillow cannot decode. HEIF needs pillow-heif.
_FORMATS = (
  *("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"),
  *("PPM", "HEIF"),
)
# In these formats, several pictures in a file are an animation. In other
# formats they are pages, previews or a stereo pair.
_ANIMATIONS = ("GIF", "WEBP", "AVIF", "PNG")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Duration of a picture in an animation whose file gives none, as in browsers.
_SECONDS = 0.1
_DAMAGE = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  struct.error,
  PIL.Image.DecompressionBombError,
)


def count(path: str | os.PathLike[str]) -> int:
  """Returns how many pictures an image or animation has, by its content.

  A file that is neither, or is damaged, counts 0.
  """
  try:
    with _open(path) as image:
      return _count(image)
  except PIL.UnidentifiedImageError:
    return int(_is_heif(path))
  except _DAMAGE:
    return 0


def read(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
  """Reads an image: upright, in sRGB, with transparent parts on white.

  An animation gives its first picture, with a warning.

  Raises:
    errors.UserError: if the file is missing, damaged or not an image, or holds
      floating-point colours.
  """
  with _reading(path) as image:
    if (number := _count(image)) > 1:
      warnings.warn(
        f"{path} is an animation of {number} pictures, of which the first is "
        "taken",
        stacklevel=3,
      )
    return _to_rgb(image, path)


def pictures(
  path: str | os.PathLike[str],
) -> Iterator[tuple[float, float, UInt8[np.ndarray, "h w 3"]]]:
  """Yields the pictures of an animation, or the single picture of an image.

  Yields:
    The time in seconds at which a picture begins, its duration in seconds (0
    for an image), and the picture.

  Raises:
    errors.UserError: as `read`.
  """
  with _reading(path) as image:
    number, start = _count(image), 0.0
    for i in range(number):
      image.seek(i)
      array = _to_rgb(image, path)
      # Pillow knows the duration only after the picture is loaded.
      seconds = (image.info.get("duration") or 1000 * _SECONDS) / 1000
      yield start, seconds if number > 1 else 0.0, array
      start += seconds


def _open(path) -> PIL.Image.Image:
  with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
  PIL.Image.init()
  known = [name for name in _FORMATS if name in PIL.Image.OPEN]
  return PIL.Image.open(path, formats=known)


def _count(image: PIL.Image.Image) -> int:
  if image.format not in _ANIMATIONS:
    return 1
  return getattr(image, "n_frames", 1)


def _is_heif(path) -> bool:
  with open(path, "rb") as f:
    start = f.read(12)
  return start[4:8] == b"ftyp" and start[8:12] in _HEIF


@contextlib.contextmanager
def _reading(path):
  """Yields an open image; turns errors of Pillow into a UserError."""
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"{path} does not exist")
  if not path.is_file():
    raise errors.UserError(f"{path} is not a file")
  try:
    containers.check_complete(path)
    with _open(path) as image:
      yield image
  except errors.UserError:  # A ValueError, which `_DAMAGE` includes.
    raise
  except _DAMAGE as e:
    if isinstance(e, PIL.UnidentifiedImageError):
      raise errors.UserError(
        f"{path} is a HEIC photograph, which is read where pillow-heif is "
        "installed: pip install pillow-heif"
        if _is_heif(path)
        else f"{path} is not an image, or its beginning is damaged"
      ) from e
    reason = " ".join(str(e).split()) or type(e).__name__
    raise errors.UserError(
      f"{path} is not a readable image or is damaged ({reason})"
    ) from e


def _to_rgb(image: PIL.Image.Image, path) -> UInt8[np.ndarray, "h w 3"]:
  """Converts a picture to upright sRGB on white."""
  profile = image.info.get("icc_profile")
  image = PIL.ImageOps.exif_transpose(image)
  if image.mode == "F":
    raise errors.UserError(
      f"{path} holds floating-point numbers, whose white is not known: expected"
      " an image of 8 or 16 bits"
    )
  if image.mode.startswith("I"):  # 16 bits, which "RGB" would clip
    grey = (np.asarray(image).astype(np.int64) + 128) // 257
    image = PIL.Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
  alpha = None
  if image.has_transparency_data:
    image = image.convert("RGBA" if image.mode not in ("LA", "La") else "LA")
    alpha = image.getchannel("A")
    image = image.convert("L" if image.mode == "LA" else "RGB")
  if profile:
    image = _to_srgb(image, profile, path)
  array = np.array(image.convert("RGB"))
  if alpha is not None:
    array = pixels.on_white(np.dstack([array, np.asarray(alpha)]))
  return array


def _to_srgb(image, profile: bytes, path) -> PIL.Image.Image:
  """Converts a picture from the file's ICC profile to sRGB."""
  if image.mode in ("P", "1"):
    image = image.convert("RGB")
  try:
    return PIL.ImageCms.profileToProfile(
      image,
      io.BytesIO(profile),
      PIL.ImageCms.createProfile("sRGB"),
      renderingIntent=PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC,
      outputMode="RGB",
    )
  except (PIL.ImageCms.PyCMSError, OSError, ValueError) as e:
    warnings.warn(
      f"{path} has a colour profile that cannot be used and is read as sRGB "
      f"({e})",
      stacklevel=5,
    )
    return image
