"""Converts a decoded frame to the upright sRGB picture that a player shows.

This module decides size, orientation and colours, for probing and for reading:
non-square pixels, display matrices, untagged colour matrices, wide gamuts, HDR
and transparency.
"""

import functools
import struct
from typing import NamedTuple

import av
import numpy as np
import PIL.Image
from av.sidedata.sidedata import Type
from av.video import reformatter
from jaxtyping import UInt8, UInt16

# Without the last two flags, swscale repeats chroma samples instead of
# interpolating them, and the error on smooth colours is seven times as large.
SCALING = (
  reformatter.Interpolation.BICUBIC
  | reformatter.Interpolation.FULL_CHR_H_INT
  | reformatter.Interpolation.ACCURATE_RND
)
BT709 = reformatter.Colorspace.ITU709

# Code points of ITU-T H.273; 0, 2 and 3 mean that a property is unknown.
_PQ, _HLG = 16, 18
_OTHER_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "DCI"}
_OTHER_MATRICES = {
  8: "YCgCo",
  10: "constant-luminance BT.2020",
  11: "YDzDx",
  12: "a matrix derived from its primaries",
  13: "a matrix derived from its primaries",
  14: "ICtCp",
  15: "Dolby Vision's IPT",
  16: "YCgCo",
  17: "YCgCo",
}
# Chromaticities x and y of red, green, blue and white. The primaries of
# standard definition are so close to those of BT.709 that players and FFmpeg do
# not convert them.
_D65 = (0.3127, 0.3290)
_BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *_D65)
_BT2020 = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65)
_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65)
_WIDE = {9: _BT2020, 11: _P3, 12: _P3}
# In cd/m2: the diffuse white of HDR, which becomes white (ITU-R BT.2408), and
# the peak of the screen for which HLG's gamma is 1.2 (ITU-R BT.2100).
_WHITE, _HLG_PEAK = 203.0, 1000.0
_FULL = 65283  # swscale's 16-bit code of white.
_MOST_ASPECT = 10  # Largest ratio of the sides of a pixel that is accepted.


class Geometry(NamedTuple):
  """How a stored picture is displayed.

  Attributes:
    aspect: width of a pixel over its height.
    transposed: whether rows are displayed as columns.
    mirrored: whether left and right are exchanged, after transposing.
    flipped: whether top and bottom are exchanged, after transposing.
    angle: counterclockwise rotation in degrees within the frame, if the file
      asks for a rotation that is not a multiple of 90 degrees; otherwise 0.
  """

  aspect: float
  transposed: bool
  mirrored: bool
  flipped: bool
  angle: float

  def shown(self, height: int, width: int) -> tuple[int, int]:
    """Returns the displayed (height, width) of a stored height and width.

    Non-square pixels change the number of columns, not of rows.
    """
    width = max(1, round(width * self.aspect))
    return (width, height) if self.transposed else (height, width)


def geometry(frame: av.VideoFrame, aspect: float | None) -> Geometry:
  """Returns how a frame is displayed, following FFmpeg's autorotation.

  Args:
    frame: the decoded frame, with its display matrix.
    aspect: width of a pixel over its height; None or 0 if the file gives none.
  """
  aspect = float(aspect or 1)
  matrix = frame.side_data.get(Type.DISPLAYMATRIX)
  if matrix is None:
    return Geometry(aspect, False, False, False, 0.0)
  angle = float(frame.rotation)
  if abs((angle + 45) % 90 - 45) > 1:
    return Geometry(aspect, False, False, False, angle)
  # ISO/IEC 14496-12, section 6.2.2: x' = a x + c y and y' = b x + d y.
  a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
  if abs(b) + abs(c) > abs(a) + abs(d):
    return Geometry(aspect, True, c < 0, b < 0, 0.0)
  return Geometry(aspect, False, a < 0, d < 0, 0.0)


def refusal(frame: av.VideoFrame, geometry: Geometry) -> str | None:
  """Returns why a frame cannot be displayed correctly, or None if it can."""
  if not 1 / _MOST_ASPECT <= geometry.aspect <= _MOST_ASPECT:
    return f"claims pixels that are {geometry.aspect:.4g} times as wide as high"
  color = None
  if not _is_rgb(frame):
    color = _OTHER_MATRICES.get(frame.colorspace)
  color = color or _OTHER_TRANSFERS.get(frame.color_trc)
  if color is None and frame.color_trc not in (_PQ, _HLG):
    # The base layer of Dolby Vision's profile 5 needs the metadata, which is
    # not applied here.
    if frame.side_data.get(Type.DOVI_METADATA) is not None:
      color = "Dolby Vision's"
  if color is not None:
    return f"has colours that are not read here ({color}): convert it to BT.709"
  return None


def to_rgb(
  frame: av.VideoFrame, geometry: Geometry, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """Converts a frame to upright sRGB, with transparent parts on white.

  HDR is converted to a standard dynamic range: diffuse white (203 cd/m2)
  becomes white, and brighter or more saturated colours are clipped.

  Args:
    frame: the decoded frame.
    geometry: how the frame is displayed.
    size: (height, width) to resize to (bicubic) while converting; None is the
      displayed size.
  """
  height, width = size or geometry.shown(frame.height, frame.width)
  if geometry.transposed:
    height, width = width, height
  wide = frame.color_trc in (_PQ, _HLG) or frame.color_primaries in _WIDE
  kind = frame.format
  alpha = kind.has_palette or any(c.is_alpha for c in kind.components)
  array = frame.to_ndarray(
    format="rgb48le" if wide else "rgba" if alpha else "rgb24",
    height=height,
    width=width,
    src_colorspace=_matrix(frame),
    interpolation=SCALING,
    threads=2,
  )
  if wide:
    array = narrow(array, frame.color_trc, frame.color_primaries)
  elif alpha:
    array = on_white(array)
  if geometry.transposed:
    array = array.transpose(1, 0, 2)
  array = array[
    :: -1 if geometry.flipped else 1, :: -1 if geometry.mirrored else 1
  ]
  if geometry.angle:
    turned = PIL.Image.fromarray(np.ascontiguousarray(array)).rotate(
      geometry.angle, PIL.Image.Resampling.BICUBIC
    )
    array = np.asarray(turned)
  return np.ascontiguousarray(array)


def _is_rgb(frame: av.VideoFrame) -> bool:
  return frame.format.is_rgb


def _matrix(frame: av.VideoFrame) -> int | None:
  """Returns the colour matrix of an untagged frame, as players choose it.

  High definition gets BT.709, standard definition BT.601. None leaves the
  matrix of a tagged frame as it is.
  """
  if frame.colorspace not in (0, 2, 3) or _is_rgb(frame):
    return None
  high = frame.width >= 1280 or frame.height > 576
  return BT709 if high else reformatter.Colorspace.ITU601


def on_white(
  array: UInt8[np.ndarray, "h w 4"],
) -> UInt8[np.ndarray, "h w 3"]:
  """Blends a partly transparent picture with a white background."""
  if array[..., 3].min() == 255:
    return array[..., :3]
  alpha = array[..., 3:].astype(np.uint32)
  return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(
    np.uint8
  )


def narrow(
  array: UInt16[np.ndarray, "h w 3"], transfer: int, primaries: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Converts a wide gamut or HDR to sRGB.

  Args:
    array: R'G'B' in 16 bits, as swscale gives it.
    transfer, primaries: code points of ITU-T H.273. HDR whose primaries are
      unknown is taken to be BT.2020.
  """
  hdr = transfer in (_PQ, _HLG)
  linear = _to_linear(transfer if hdr else 0)[array]
  if primaries in _WIDE or (hdr and primaries in (0, 2, 3)):
    linear = linear @ _gamut(_WIDE.get(primaries, _BT2020)).T
  index = np.clip(linear, 0, 1) * np.float32(65535) + np.float32(0.5)
  return _from_linear(hdr)[index.astype(np.uint16)]


@functools.cache
def _to_linear(transfer: int) -> np.ndarray:
  """Returns the linear light of swscale's 16-bit codes: float32 (65536,).

  White is 1. HDR follows ITU-R BT.2100; other transfers are those of the
  reference display of ITU-R BT.1886. HLG's gamma is applied to each primary
  instead of the luminance, as in FFmpeg's zscale.
  """
  x = np.minimum(np.arange(65536) / _FULL, 1)
  if transfer == _PQ:
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
    x = x ** (1 / m2)
    y = 10000 / _WHITE * (np.maximum(x - c1, 0) / (c2 - c3 * x)) ** (1 / m1)
  elif transfer == _HLG:
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12)
    y = _HLG_PEAK / _WHITE * scene**1.2
  else:
    y = x**2.4
  return y.astype(np.float32)


@functools.cache
def _from_linear(srgb: bool) -> np.ndarray:
  """Returns the 8-bit codes of linear light in 16 bits: uint8 (65536,)."""
  x = np.linspace(0, 1, 65536)
  y = x ** (1 / 2.4)
  if srgb:
    y = np.where(x <= 0.0031308, 12.92 * x, 1.055 * y - 0.055)
  return (255 * y + 0.5).astype(np.uint8)


@functools.cache
def _gamut(primaries: tuple[float, ...]) -> np.ndarray:
  """Returns the matrix from linear RGB of `primaries` to BT.709: (3, 3)."""

  def to_xyz(primaries):
    x, y = np.array(primaries).reshape(4, 2).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])

  return np.linalg.solve(to_xyz(_BT709), to_xyz(primaries)).astype(np.float32)
