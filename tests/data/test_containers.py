"""Containers: whole files are read, and truncated ones are refused."""

import struct

import av
import numpy as np
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import containers, video


def _piped(path):
  """Writes an AVI as ffmpeg does to a pipe: without sizes and index."""
  recordings.encode(path, 24, codec="mpeg4")
  content = path.read_bytes()
  at = content.index(b"movi") - 4
  (size,) = struct.unpack("<I", content[at : at + 4])
  unknown = b"\xff" * 4
  path.write_bytes(
    content[:4]
    + unknown
    + content[8:at]
    + unknown
    + content[at + 4 : at + 4 + size]
  )
  return path


def test_an_avi_from_a_pipe(tmp_path):
  path = _piped(tmp_path / "a.avi")
  assert len(recordings.read(path)) == 24
  info = video.probe(path)
  assert (info.frames, info.fps) == (24, 16)
  assert info.seconds == pytest.approx(1.5)
  content = path.read_bytes()
  for kept in (len(content) - 100, len(content) // 2):
    path.write_bytes(content[:kept])
    with pytest.raises(errors.UserError, match="truncated"):
      video.probe(path)


@pytest.mark.parametrize(
  "trailer",
  [
    np.random.default_rng(0).bytes(4000),
    b"GPS,47.3769,8.5417\n" * 20,
    bytes(64),
    b"\xff" * 100,
    struct.pack(">I4s", 1000, b"free") + bytes(992),
  ],
  ids=["noise", "text", "zeros", "ones", "box"],
)
@pytest.mark.parametrize("fragmented", [False, True])
def test_data_behind_an_mp4(tmp_path, trailer, fragmented):
  path = tmp_path / "a.mp4"
  flags = {"movflags": "frag_keyframe+empty_moov"} if fragmented else {}
  recordings.encode(path, 24, options=flags)
  whole = path.read_bytes()
  path.write_bytes(whole + trailer)
  assert len(recordings.read(path)) == 24
  assert video.probe(path).frames == 24
  # The index is behind the pictures: without it nothing is known.
  for kept in (len(whole) - 20, len(whole) // 2):
    path.write_bytes(whole[:kept])
    with pytest.raises(errors.UserError, match="truncated"):
      video.probe(path)


def test_a_movie_without_a_file_type(tmp_path):
  """Old QuickTime files begin with their pictures."""
  path = tmp_path / "a.mov"
  recordings.encode(path, 8, format="mov")
  content = path.read_bytes()
  first = struct.unpack(">I", content[:4])[0]
  assert content[4:8] == b"ftyp"
  # Offsets count from the beginning of the file, so the size must stay.
  path.write_bytes(
    struct.pack(">I4s", first, b"wide") + bytes(first - 8) + content[first:]
  )
  assert len(recordings.read(path)) == 8
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(errors.UserError, match="truncated"):
    containers.check_complete(path)


def test_pictures_that_an_index_promises(tmp_path):
  """A media box of unknown size ends where the file does."""
  path = tmp_path / "a.mp4"
  recordings.encode(path, 24, options={"movflags": "faststart"})
  content = bytearray(path.read_bytes())
  at = content.index(b"mdat") - 4
  content[at : at + 4] = bytes(4)
  path.write_bytes(content)
  assert video.probe(path).frames == 24
  path.write_bytes(content[:-2000])
  for function in (video.probe, recordings.read):
    with pytest.raises(errors.UserError, match="truncated"):
      function(path)


@pytest.mark.parametrize("live", ["0", "1"])
@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_broken_blocks_are_told(tmp_path, name, live):
  path = tmp_path / name
  codec = "libx264" if name == "a.mkv" else "libvpx-vp9"
  recordings.encode(path, 24, codec=codec, options={"live": live})
  assert len(recordings.read(path)) == video.probe(path).frames == 24
  whole = path.read_bytes()
  # With a wrong block length, the next block seems to begin elsewhere.
  with av.open(str(path)) as container:
    (packet, *_) = [p for p in container.demux(video=0) if p.size][12:]
  content = bytearray(whole)
  at = content.index(bytes(packet)) - 6
  content[at : at + 2] = b"\x7f\x00"
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match="damaged"):
    video.probe(path)
  for kept in (len(whole) // 3, len(whole) - 30):
    path.write_bytes(whole[:kept])
    with pytest.raises(errors.UserError, match="truncated"):
      video.probe(path)


def test_pictures_that_are_never_shown_are_not_counted(tmp_path):
  """VP8 has frames that only serve as references for other frames."""
  path = tmp_path / "a.webm"
  recordings.encode(path, 24, codec="libvpx")
  hidden = tmp_path / "b.webm"
  with av.open(str(path)) as old, av.open(str(hidden), "w") as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for i, packet in enumerate(old.demux(video=0)):
      if packet.dts is not None:
        content = bytearray(bytes(packet))
        if i % 5 == 3:
          content[0] &= ~0x10
        copy = av.Packet(bytes(content))
        copy.pts, copy.dts = packet.pts, packet.dts
        copy.time_base, copy.stream = packet.time_base, stream
        copy.is_keyframe = packet.is_keyframe
        new.mux(copy)
  assert len(recordings.read(hidden)) == video.probe(hidden).frames == 19
