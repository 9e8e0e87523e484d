#!/usr/bin/env bash
# PyAV 18.1.0 (libswscale 9.5): white is not 65535 in 16 bits of RGB.
#
# A white frame of YUV (luma 235 in 8 bits, 940 in 10 and 3760 in 12, neutral
# chroma) becomes 255 in rgb24, the largest number there is. In rgb48le the
# same frame becomes 65283, which is 0.9962 of the largest number, while black
# becomes 0. That is so with the flags for exact rounding too, which are set
# below.
#
# It matters to those who read 10-bit or HDR video through 16 bits and divide
# by 65535: their white is 0.9962, and PQ's steep curve turns that into 9640
# cd/m2 where the video says 10000. This project divides the 16 bits that it
# reads wide gamuts and HDR through by 65283.
#
# Exits with 0 if libswscale does so, with 1 if that has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import av
import numpy as np
from av import library_versions
from av.video.reformatter import Colorspace, Interpolation

EXACT = (
  Interpolation.BICUBIC
  | Interpolation.FULL_CHR_H_INT
  | Interpolation.ACCURATE_RND
  | Interpolation.BITEXACT
)


def gray(kind, bits, luma):
  frame = av.VideoFrame(64, 64, kind)
  dtype = np.uint8 if bits == 8 else np.dtype("<u2")
  for plane, value in zip(frame.planes, (luma, 128, 128), strict=True):
    size = plane.buffer_size // np.dtype(dtype).itemsize
    plane.update(np.full(size, value << (bits - 8), dtype).tobytes())
  frame.colorspace, frame.color_range = Colorspace.ITU709, 1
  return frame


def rgb(frame, kind):
  array = frame.to_ndarray(format=kind, interpolation=EXACT)
  assert array.min() == array.max()
  return int(array.max())


def pq(x):
  """The light of a code in cd/m2, by ITU-R BT.2100."""
  m1, m2 = 2610 / 16384, 2523 / 32
  c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
  x = x ** (1 / m2)
  return 10000 * (max(x - c1, 0) / (c2 - c3 * x)) ** (1 / m1)


version = ".".join(map(str, library_versions["libswscale"]))
print(f"av {av.__version__}, libswscale {version}, numpy {np.__version__}")
as_described = True
for kind, bits in (("yuv444p", 8), ("yuv420p10le", 10), ("yuv444p12le", 12)):
  white, black = gray(kind, bits, 235), gray(kind, bits, 16)
  narrow, wide = rgb(white, "rgb24"), rgb(white, "rgb48le")
  zero = rgb(black, "rgb48le")
  print(
    f"{kind}: rgb24 {narrow}, expected in rgb48le 65535, seen {wide}, "
    f"black {zero}; PQ white read as {pq(wide / 65535):.0f} cd/m2"
  )
  as_described &= (narrow, wide, zero) == (255, 65283, 0)
if not as_described:
  print("changed: this version does not do what is described above")
  sys.exit(1)
print("as described: white is 255 in 8 bits and 65283 in 16")
PYTHON
