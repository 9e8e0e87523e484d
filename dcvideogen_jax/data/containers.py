"""Detects truncated video files by their outermost structure.

libav reads a truncated file to its end without an error.
"""

import os
import pathlib
import struct
from collections.abc import Iterator

from dcvideogen_jax import documents, errors

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_CLUSTER = b"\x1f\x43\xb6\x75"
# IDs of elements that a file, a segment and a cluster may contain (RFC 9559).
_ELEMENTS = {
  _EBML,
  _SEGMENT,
  _CLUSTER,
  *map(
    bytes.fromhex,
    "114d9b74 1549a966 1654ae6b 1c53bb6b 1941a469 1043a770 1254c367 ec bf e7 a3"
    " a0 ab a7 5854 af".split(),
  ),
}
# Top-level boxes of an mp4 or mov. Anything else after the media is a trailer
# that another program has appended.
_BOXES = (
  *(b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"ssix"),
  *(b"free", b"skip", b"wide", b"pnot", b"meta", b"uuid", b"udta", b"emsg"),
  *(b"prft", b"pdin", b"idat"),
)
# Size of a chunk whose size was unknown when it was written.
_UNKNOWN = 0xFFFFFFFF


def check_complete(path: str | os.PathLike[str]) -> None:
  """Checks that an mp4, mov, mkv, webm, avi or gif is as long as it claims.

  Files in other formats pass, except for a pointer or a web page that a
  download has left in place of a file.

  Raises:
    errors.UserError: if the file is truncated or only stands in for another.
    OSError: if the file cannot be read.
  """
  path = pathlib.Path(path)
  length = path.stat().st_size
  with path.open("rb") as f:
    start = f.read(64)
    if what := documents.stand_in(start):
      raise errors.UserError(f"{path} {what}")
    if start[4:8] in _BOXES:
      claimed = max((end for _, end in _boxes(f, length)), default=0)
    elif start[:4] == _EBML:
      _, claimed = _segment(start) or (0, 0)
    elif start[:4] == b"RIFF" and start[8:12] == b"AVI ":
      claimed = _chunks(f, length)
    elif start[:4] == b"GIF8":
      claimed = _gif(f)
    else:
      return
  if claimed > length:
    raise errors.UserError(
      f"{path} is truncated: it should have {claimed} bytes at least and has "
      f"{length}"
    )


def fragmented(path: str | os.PathLike[str]) -> bool:
  """Returns whether an mp4 or mov has movie fragments.

  The index of a fragmented file does not list all frames.

  Raises:
    OSError: if the file cannot be read.
  """
  path = pathlib.Path(path)
  with path.open("rb") as f:
    boxes = _boxes(f, path.stat().st_size)
    return any(kind == b"moof" for kind, _ in boxes)


def _boxes(f, length: int) -> Iterator[tuple[bytes, int]]:
  """Yields type and end of the top-level boxes.

  Follows ISO/IEC 14496-12, section 4.2. The end is a position in bytes, which a
  truncated file does not reach.
  """
  position = 0
  kinds: set[bytes] = set()
  while position + 8 <= length:
    f.seek(position)
    header = f.read(16)
    kind = header[4:8]
    size = struct.unpack(">I", header[:4])[0]
    if size == 1 and len(header) == 16:
      size = struct.unpack(">Q", header[8:])[0]
    if size < 8:  # 0 means that the box extends to the end of the file.
      break
    whole = {b"moov", b"mdat"} <= kinds or b"moof" in kinds
    if kind not in _BOXES and whole and position + size > length:
      break
    kinds.add(kind)
    position += size
    yield kind, position


def _chunks(f, length: int) -> int:
  """Returns the byte at which the chunks of an AVI end.

  An AVI that was written to a pipe has lists of unknown size, all ones or
  zeros. Only the chunks of the frames inside have correct sizes.
  """
  position, end = 12, 0
  f.seek(4)
  total = struct.unpack("<I", f.read(4))[0]
  if total not in (0, _UNKNOWN):
    return 8 + total
  while position + 8 <= length:
    f.seek(position)
    header = f.read(12)
    kind, size = header[:4], struct.unpack("<I", header[4:8])[0]
    if kind == b"LIST" and size in (0, _UNKNOWN):
      position += 12
      continue
    end = position + 8 + size
    position = end + size % 2
  return end


def _gif(f) -> int:
  """Returns the byte at which the last block of a GIF ends (GIF89a).

  A block that the file does not complete ends after the file.
  """

  def table(flags):
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

  f.seek(0)
  content = f.read()
  position = 13
  if position <= len(content):
    position += table(content[10])
  while position < len(content) and content[position] in b"\x21\x2c":
    if content[position] == 0x21:  # An extension.
      position += 2
    elif position + 9 < len(content):  # An image.
      position += 11 + table(content[position + 9])
    else:
      return len(content) + 1
    while position < len(content) and content[position]:
      position += 1 + content[position]
    position += 1
  return position


def _segment(start: bytes) -> tuple[int, int] | None:
  """Returns the bytes at which the content of the segment begins and ends.

  Follows RFC 8794, section 6. The end is 0 if the file gives no size. Returns
  None if there is no segment.
  """
  header_size, width = _variable_integer(start, 4)
  position = 4 + width + header_size
  if start[position : position + 4] != _SEGMENT:
    return None
  size, width = _variable_integer(start, position + 4)
  position += 4 + width
  return position, 0 if size == (1 << 7 * width) - 1 else position + size


def check_clusters(path: str | os.PathLike[str]) -> None:
  """Checks that the elements of an mkv or webm follow each other to its end.

  Where they do not, libav skips to the next cluster without an error.

  Raises:
    errors.UserError: if the file is truncated or damaged.
    OSError: if the file cannot be read.
  """
  path = pathlib.Path(path)
  length = path.stat().st_size
  with path.open("rb") as f:
    segment = _segment(f.read(64))
    if segment is None:
      return
    position, end = segment
    end = end or length
    while position < end:
      f.seek(position)
      header = f.read(16)
      name = header[: 9 - header[0].bit_length()]
      size, width = _variable_integer(header, len(name))
      if name not in _ELEMENTS:
        raise errors.UserError(f"{path} is damaged at byte {position}")
      position += len(name) + width
      if name not in (_SEGMENT, _CLUSTER):
        position += size
  if position > end:
    raise errors.UserError(
      f"{path} is truncated or damaged: its last part ends at byte {position}, "
      f"after byte {end}"
    )


def _variable_integer(content: bytes, position: int) -> tuple[int, int]:
  """Returns value and width in bytes of an EBML variable-size integer."""
  first = content[position] if position < len(content) else 0
  width = 9 - first.bit_length()
  encoded = int.from_bytes(content[position : position + width], "big")
  return encoded & ((1 << 7 * width) - 1), width
