"""From a decoded frame to the upright sRGB picture that a player shows.

Size, orientation and colours are decided here, for probing and for reading:
pixels that are not square, display matrices, matrices that are not tagged, wide
gamuts and HDR, transparency.
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

# Without the last two, swscale repeats chroma samples instead of interpolating
# them, which is seven times as far from the picture on smooth colours.
SCALING = (
  reformatter.Interpolation.BICUBIC
  | reformatter.Interpolation.FULL_CHR_H_INT
  | reformatter.Interpolation.ACCURATE_RND
)
BT709 = reformatter.Colorspace.ITU709

# The numbers of ITU-T H.273; 0, 2 and 3 stand for what is not known.
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
# x and y of red, green, blue and white. The primaries of standard definition
# are so near those of BT.709 that players and FFmpeg leave them as they are.
_D65 = (0.3127, 0.3290)
_BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *_D65)
_BT2020 = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65)
_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65)
_WIDE = {9: _BT2020, 11: _P3, 12: _P3}
# Diffuse white of HDR in cd/m2, which becomes white (ITU-R BT.2408), and the
# screen that HLG's gamma of 1.2 is for (ITU-R BT.2100).
_WHITE, _HLG_PEAK = 203.0, 1000.0
# What swscale makes of white in 16 bits.
_FULL = 65283
# No camera's pixel is wider or higher than this.
_MOST_ASPECT = 10


class Geometry(NamedTuple):
  """How a stored picture lies on the screen.

  Attributes:
    aspect: width of a pixel over its height.
    transposed: whether rows are shown as columns.
    mirrored: whether left and right are exchanged, after that.
    flipped: whether top and bottom are exchanged, after that.
    angle: degrees by which the picture is turned counterclockwise within its
      frame instead, where the file asks for no quarter turn; else 0.
  """

  aspect: float
  transposed: bool
  mirrored: bool
  flipped: bool
  angle: float

  def shown(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) on the screen of stored ones; rows keep their number."""
    width = max(1, round(width * self.aspect))
    return (width, height) if self.transposed else (height, width)


def geometry(frame: av.VideoFrame, aspect: float | None) -> Geometry:
  """How a frame is shown, as FFmpeg's autorotation has it.

  Args:
    frame: as decoded, with its display matrix.
    aspect: width of a pixel over its height; None or 0 if the file is silent.
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
  """Why a frame cannot be shown in its colours or shape; None if it can."""
  if not 1 / _MOST_ASPECT <= geometry.aspect <= _MOST_ASPECT:
    return f"claims pixels that are {geometry.aspect:.4g} times as wide as high"
  color = None
  if not _is_rgb(frame):
    color = _OTHER_MATRICES.get(frame.colorspace)
  color = color or _OTHER_TRANSFERS.get(frame.color_trc)
  if color is None and frame.color_trc not in (_PQ, _HLG):
    # The base layer of profile 5 makes sense with its metadata alone.
    if frame.side_data.get(Type.DOVI_METADATA) is not None:
      color = "Dolby Vision's"
  if color is not None:
    return f"has colours that are not read here ({color}): convert it to BT.709"
  return None


def to_rgb(
  frame: av.VideoFrame, geometry: Geometry, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """The upright picture in sRGB, transparent parts on white.

  HDR is brought to a screen without HDR: diffuse white (203 cd/m2) becomes
  white, and what is brighter or more colourful than the screen is clipped.

  Args:
    frame: as decoded.
    geometry: how it is shown.
    size: (height, width) to resize to (bicubic) while converting; None is the
      size that is shown.
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
  """Where nothing is tagged, BT.709 for high definition, as players have it."""
  if frame.colorspace not in (0, 2, 3) or _is_rgb(frame):
    return None
  high = frame.width >= 1280 or frame.height > 576
  return BT709 if high else reformatter.Colorspace.ITU601


def on_white(
  array: UInt8[np.ndarray, "h w 4"],
) -> UInt8[np.ndarray, "h w 3"]:
  """A picture that is partly transparent, on white paper."""
  if array[..., 3].min() == 255:
    return array[..., :3]
  alpha = array[..., 3:].astype(np.uint32)
  return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(
    np.uint8
  )


def narrow(
  array: UInt16[np.ndarray, "h w 3"], transfer: int, primaries: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Brings a wide gamut or HDR to sRGB.

  Args:
    array: 16 bits of R'G'B', as swscale has them.
    transfer, primaries: by the numbers of ITU-T H.273. HDR whose primaries are
      not tagged is BT.2020's.
  """
  hdr = transfer in (_PQ, _HLG)
  linear = _to_linear(transfer if hdr else 0)[array]
  if primaries in _WIDE or (hdr and primaries in (0, 2, 3)):
    linear = linear @ _gamut(_WIDE.get(primaries, _BT2020)).T
  index = np.clip(linear, 0, 1) * np.float32(65535) + np.float32(0.5)
  return _from_linear(hdr)[index.astype(np.uint16)]


@functools.cache
def _to_linear(transfer: int) -> np.ndarray:
  """Linear light of swscale's 16-bit codes, 1 for white: float32 (65536,).

  ITU-R BT.2100 for HDR; for others the screen of ITU-R BT.1886. HLG's gamma is
  taken of each primary, as FFmpeg's zscale has it, not of the luminance.
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
  """8-bit codes of linear light in 16 bits: uint8 (65536,)."""
  x = np.linspace(0, 1, 65536)
  y = x ** (1 / 2.4)
  if srgb:
    y = np.where(x <= 0.0031308, 12.92 * x, 1.055 * y - 0.055)
  return (255 * y + 0.5).astype(np.uint8)


@functools.cache
def _gamut(primaries: tuple[float, ...]) -> np.ndarray:
  """Linear RGB of other primaries to BT.709's: float32 (3, 3)."""

  def to_xyz(primaries):
    x, y = np.array(primaries).reshape(4, 2).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])

  return np.linalg.solve(to_xyz(_BT709), to_xyz(primaries)).astype(np.float32)
