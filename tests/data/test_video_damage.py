"""Bad video files are refused with one sentence."""

import wave

import av
import numpy as np
import PIL.Image
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import stills, video


def _zero_frames(path):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=16)
    stream.height = stream.width = 32
    stream.pix_fmt = "yuv420p"
    container.start_encoding()


def _audio_only(path):
  with wave.open(str(path), "wb") as f:
    f.setparams((1, 2, 8000, 0, "NONE", "none"))
    f.writeframes(bytes(1600))


BAD = {
  "text.mp4": lambda p: p.write_text("This is not a video.\n" * 100),
  # FFmpeg would decode these as text-mode animations.
  "prompts.txt": lambda p: p.write_text("This is not a video.\n" * 100),
  "readme.nfo": lambda p: p.write_text("This is not a video.\n" * 100),
  "empty.mp4": lambda p: p.write_bytes(b""),
  "zeros.mp4": lambda p: p.write_bytes(bytes(10_000)),
  "folder.mp4": lambda p: p.mkdir(),
  "missing.mp4": lambda p: None,
  "noframes.mp4": _zero_frames,
  "audio.wav": _audio_only,
}


@pytest.mark.parametrize("function", [video.probe, recordings.read])
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_in_a_sentence(tmp_path, name, function, capfd):
  path = tmp_path / name
  BAD[name](path)
  with pytest.raises(errors.UserError) as e:
    function(path)
  message = str(e.value)
  assert str(path) in message and "\n" not in message
  assert "Errno" not in message
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
@pytest.mark.parametrize(
  ("start", "word"),
  [
    ("version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ("<!DOCTYPE html>\n<html>", "web page"),
  ],
)
def test_what_stands_in_for_a_file_is_named(tmp_path, name, start, word):
  (tmp_path / name).write_text(start + "size 3\n")
  for function in (video.probe, stills.read):
    with pytest.raises(errors.UserError, match=f"^[^ ]*{name} is .*{word}"):
      function(tmp_path / name)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("index_first", [True, False])
def test_truncated_mp4(tmp_path, noisy, kept, index_first):
  path = tmp_path / "a.mp4"
  if not index_first:
    with (
      av.open(str(noisy)) as source,
      av.open(str(path), "w") as target,
    ):
      stream = target.add_stream_from_template(source.streams.video[0])
      for packet in source.demux(source.streams.video[0]):
        if packet.dts is not None:
          packet.stream = stream
          target.mux(packet)
    assert len(recordings.read(path)) == 30
    content = path.read_bytes()
  else:
    content = noisy.read_bytes()
  path.write_bytes(content[: int(len(content) * kept)])
  with pytest.raises(errors.UserError, match="truncated|damaged"):
    recordings.read(path)
  with pytest.raises(errors.UserError, match="truncated|damaged"):
    video.probe(path)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi", ".mov"])
def test_truncated_files_of_other_kinds(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  recordings.encode(
    path, 8, codec="libvpx-vp9" if suffix == ".webm" else "libx264"
  )
  assert len(recordings.read(path)) == 8
  content = path.read_bytes()
  for kept in (len(content) - 1, len(content) // 2):
    path.write_bytes(content[:kept])
    with pytest.raises(errors.UserError, match="truncated|damaged"):
      recordings.read(path)


def test_a_packet_cut_off_in_a_transport_stream_is_told(tmp_path):
  path = tmp_path / "a.ts"
  # Noise, of which a frame takes many packets of 188 bytes.
  recordings.encode(path, 8, 96, 96)
  assert len(recordings.read(path)) == 8
  path.write_bytes(path.read_bytes()[: -188 * 6])
  for _ in range(100):  # as threads of the decoder may race
    with pytest.raises(errors.UserError, match="damaged near frame"):
      recordings.read(path)


def test_damage_in_the_middle_is_told_when_it_is_met(tmp_path, noisy):
  content = bytearray(noisy.read_bytes())
  start = content.index(b"mdat")
  middle = start + (len(content) - start) // 2
  content[middle : middle + 3000] = bytes(3000)
  path = tmp_path / "a.mp4"
  path.write_bytes(content)
  intact = recordings.read(noisy)
  count = 0
  with pytest.raises(errors.UserError, match="damaged near frame"):
    for frame in video.read_frames(path):
      np.testing.assert_array_equal(frame, intact[count])
      count += 1
  assert 0 < count < 30


def test_small_damage_is_mostly_noticed(tmp_path):
  """H.264 has no checksums, but its decoder reports when it conceals errors."""
  rng = np.random.default_rng(1)
  frames = recordings.clip(20, 64, 96).astype(int) + rng.normal(
    0, 10, (20, 64, 96, 3)
  )
  path = recordings.write(
    tmp_path / "a.mp4", np.clip(frames, 0, 255).astype(np.uint8)
  )
  whole = path.read_bytes()
  start = whole.index(b"mdat") + 1000
  noticed = 0
  for _ in range(60):
    content = bytearray(whole)
    at = int(rng.integers(start, len(whole) - 8))
    content[at : at + 8] = rng.bytes(8)
    path.write_bytes(content)
    try:
      assert len(recordings.read(path)) == 20
    except errors.UserError as e:
      assert "damaged near frame" in str(e)
      noticed += 1
  assert noticed >= 15


def test_a_cover_picture_is_no_video(tmp_path):
  _audio_only(tmp_path / "a.wav")
  PIL.Image.fromarray(recordings.clip(1)[0]).save(tmp_path / "a.png")
  path = tmp_path / "a.m4a"
  with (
    av.open(str(path), "w", format="mp4") as target,
    av.open(str(tmp_path / "a.wav")) as sound,
    av.open(str(tmp_path / "a.png")) as picture,
  ):
    audio = target.add_stream("aac", rate=8000)
    cover = target.add_stream_from_template(picture.streams.video[0])
    cover.disposition = av.stream.Disposition.attached_pic
    for packet in picture.demux(video=0):
      if packet.size:
        packet.stream = cover
        target.mux(packet)
    for frame in sound.decode(audio=0):
      target.mux(audio.encode(frame))
    target.mux(audio.encode(None))
  with pytest.raises(errors.UserError, match="no video stream"):
    recordings.read(path)


def test_a_broken_picture_in_an_avi_of_jpegs_is_told(tmp_path):
  path = tmp_path / "a.avi"
  rng = np.random.default_rng(0)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mjpeg", rate=16)
    stream.height = stream.width = 96
    stream.pix_fmt = "yuvj420p"
    for array in rng.integers(0, 256, (6, 96, 96, 3), np.uint8):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
    container.mux(stream.encode(None))
  assert len(recordings.read(path)) == 6
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 600] = rng.bytes(600)
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match="a.avi is damaged near frame"):
    recordings.read(path)


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_tags_in_no_encoding_are_no_damage(tmp_path, suffix):
  codec = "libvpx-vp9" if suffix == "webm" else "libx264"
  path = tmp_path / f"in.{suffix}"
  recordings.encode(path, 3, codec=codec)
  expected = recordings.read(path)
  content = path.read_bytes()
  assert b"Lavf" in content
  path.write_bytes(content.replace(b"Lavf", b"\xcc\xff\xfe\xfd"))
  np.testing.assert_array_equal(recordings.read(path), expected)
  assert video.probe(path).frames == 3
