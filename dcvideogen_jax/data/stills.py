"""Reading photographs and animations as uint8 sRGB arrays, on Pillow."""

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

# What is read here. Of other formats some run programs, and some are videos
# that Pillow cannot decode. HEIF is known where pillow-heif is installed.
_FORMATS = (
  *("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"),
  *("PPM", "HEIF"),
)
# Several pictures in a file are an animation in these formats. In others they
# are pages, previews or a second eye.
_ANIMATIONS = ("GIF", "WEBP", "AVIF", "PNG")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Of a picture in an animation that has no duration, as browsers have it.
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
  """Pictures that an image or animation shows, by its content; 0 if none."""
  try:
    with _open(path) as image:
      return _count(image)
  except PIL.UnidentifiedImageError:
    return int(_is_heif(path))
  except _DAMAGE:
    return 0


def read(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
  """Reads an image, upright, in sRGB, transparent parts on white.

  Of an animation, the first picture is taken, which is said.

  Raises:
    errors.UserError: if the file is missing, damaged or no image, or has
      colours that are not read here.
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
  """Yields the pictures of an animation, or the one of an image.

  Yields:
    (when it begins, how long it is shown, the picture); seconds.

  Raises:
    errors.UserError: as `read`.
  """
  with _reading(path) as image:
    number, start = _count(image), 0.0
    for i in range(number):
      image.seek(i)
      array = _to_rgb(image, path)
      # Known once the picture is loaded.
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
  """Yields an open image; what goes wrong with it becomes one sentence."""
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"{path} does not exist")
  if not path.is_file():
    raise errors.UserError(f"{path} is not a file")
  try:
    containers.check_complete(path)
    with _open(path) as image:
      yield image
  except errors.UserError:  # It is a ValueError, and says all.
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
  """A picture upright, in sRGB, on white."""
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
  """Through the ICC profile of the file."""
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
