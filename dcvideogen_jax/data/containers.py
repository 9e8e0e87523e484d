"""Telling truncated video files from their outermost structure.

libav reads a file that was cut off up to its end and says nothing.
"""

import os
import pathlib
import struct
from collections.abc import Iterator

from dcvideogen_jax import errors

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def check_complete(path: str | os.PathLike[str]) -> None:
  """Refuses an mp4, mov, mkv, webm or avi that is shorter than it claims.

  Says nothing about other files.

  Raises:
    errors.UserError: if the file is truncated.
    OSError: if it cannot be read.
  """
  path = pathlib.Path(path)
  length = path.stat().st_size
  with path.open("rb") as f:
    start = f.read(64)
    if start[4:8] == b"ftyp":
      claimed = max((end for _, end in _boxes(f, length)), default=0)
    elif start[:4] == _EBML:
      claimed = _segment(start)
    elif start[:4] == b"RIFF" and len(start) >= 8:
      claimed = 8 + struct.unpack("<I", start[4:8])[0]
    else:
      return
  if claimed > length:
    raise errors.UserError(
      f"{path} is truncated: it should have {claimed} bytes and has {length}"
    )


def fragmented(path: str | os.PathLike[str]) -> bool:
  """Whether an mp4 or mov has movie fragments, so that its index is no whole.

  Raises:
    OSError: if it cannot be read.
  """
  path = pathlib.Path(path)
  with path.open("rb") as f:
    boxes = _boxes(f, path.stat().st_size)
    return any(kind == b"moof" for kind, _ in boxes)


def _boxes(f, length: int) -> Iterator[tuple[bytes, int]]:
  """Type and end of the top-level boxes (ISO/IEC 14496-12, section 4.2)."""
  position = 0
  while position + 8 <= length:
    f.seek(position)
    header = f.read(16)
    size = struct.unpack(">I", header[:4])[0]
    if size == 1 and len(header) == 16:
      size = struct.unpack(">Q", header[8:])[0]
    if size < 8:  # 0 means "to the end of the file"
      break
    position += size
    yield header[4:8], position


def _segment(start: bytes) -> int:
  """End of the segment (RFC 8794, section 6), 0 if that was left open."""
  header_size, width = _variable_integer(start, 4)
  position = 4 + width + header_size
  if start[position : position + 4] != _SEGMENT:
    return 0
  size, width = _variable_integer(start, position + 4)
  unknown = size == (1 << 7 * width) - 1
  return 0 if unknown else position + 4 + width + size


def _variable_integer(content: bytes, position: int) -> tuple[int, int]:
  """Value and width in bytes of an EBML variable-size integer."""
  first = content[position] if position < len(content) else 0
  width = 9 - first.bit_length()
  encoded = int.from_bytes(content[position : position + width], "big")
  return encoded & ((1 << 7 * width) - 1), width
