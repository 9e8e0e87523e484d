"""Which frames a video shows, and when: counts, times, places."""

import fractions

import av
import numpy as np
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import video


def _trimmed(source, target, first):
  """Trims like `ffmpeg -ss -c copy`: an edit list hides the first frames."""
  with av.open(str(source)) as old, av.open(str(target), "w") as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for packet in old.demux(video=0):
      if packet.dts is not None:
        shift = round(first / 16 / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = stream
        new.mux(packet)
  return target


def _timed(path, times, base=90000):
  """Writes a video of frames with rising grey levels at these times."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.height = stream.width = 32
    stream.pix_fmt = "yuv420p"
    stream.time_base = stream.codec_context.time_base = fractions.Fraction(
      1, base
    )
    for i, time in enumerate(times):
      picture = np.full((32, 32, 3), 4 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      frame.pts, frame.time_base = round(time * base), stream.time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


@pytest.mark.parametrize("first", [1, 19])
def test_a_trimmed_video_has_the_frames_that_are_shown(tmp_path, noisy, first):
  path = _trimmed(noisy, tmp_path / "trimmed.mp4", first)
  with av.open(str(path)) as container:
    assert container.streams.video[0].frames == 30  # as the container has it
  shown = recordings.read(noisy)[first:]
  np.testing.assert_array_equal(recordings.read(path), shown)
  info = video.probe(path)
  assert info.frames == len(shown)
  assert info.seconds == pytest.approx(len(shown) / 16)
  np.testing.assert_array_equal(
    recordings.read(path, start=5 / 16, max_frames=2), shown[5:7]
  )


def test_times_are_those_of_the_file(tmp_path):
  rng = np.random.default_rng(0)
  times = np.cumsum(np.r_[0.0, rng.uniform(0.02, 0.2, 19)])
  path = _timed(tmp_path / "a.mp4", times + 3.5)
  found = list(video.frames(path))
  assert [f.seconds for f in found] == pytest.approx(times, abs=1e-4)
  for i, frame in enumerate(found):
    assert frame.rgb().mean() == pytest.approx(4 * i, abs=3)
    assert frame.rgb((6, 4)).shape == (6, 4, 3)
  info = video.probe(path)
  assert info.fps == pytest.approx(19 / times[-1], rel=0.05)
  assert info.seconds == pytest.approx(times[-1] + 1 / info.fps, abs=0.1)
  later = list(video.frames(path, start=times[7]))
  assert [f.seconds for f in later] == pytest.approx(times[7:], abs=1e-4)


def test_times_that_start_anew_go_on(tmp_path):
  for name in "ab":
    recordings.encode(tmp_path / f"{name}.ts", 5)
  both = tmp_path / "both.ts"
  both.write_bytes(
    (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
  )
  found = [f.seconds for f in video.frames(both)]
  assert found == pytest.approx(np.arange(10) / 16, abs=1e-4)
  info = video.probe(both)
  assert (info.fps, info.seconds) == pytest.approx((16, 10 / 16), rel=0.02)


@pytest.mark.parametrize(
  ("name", "codec", "options"),
  [
    ("a.ts", "libx264", {}),
    ("a.avi", "mpeg4", {}),
    ("a.mpg", "mpeg2video", {}),
    ("a.mp4", "libx265", {"x265-params": "log-level=none"}),
    ("a.webm", "libvpx", {}),
  ],
)
def test_a_place_is_found_in_any_container(tmp_path, name, codec, options):
  path = tmp_path / name
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=25)
    stream.height = stream.width = 64
    stream.pix_fmt = "yuv420p"
    stream.gop_size, stream.max_b_frames = 12, 2
    stream.options = options
    for i in range(50):
      picture = np.full((64, 64, 3), 5 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  whole = recordings.read(path)
  info = video.probe(path)
  assert (info.frames, len(whole)) == (50, 50)
  for first in (1, 11, 12, 13, 24, 47):
    np.testing.assert_array_equal(
      recordings.read(path, start=first / 25, max_frames=2),
      whole[first : first + 2],
    )
  with pytest.raises(errors.UserError, match="from second 2.5 on"):
    recordings.read(path, start=2.5)


def test_fragments_are_counted(tmp_path):
  path = tmp_path / "a.mp4"
  flags = {"movflags": "frag_keyframe+empty_moov"}
  recordings.encode(path, 40, options=flags)
  info = video.probe(path)
  assert (info.frames, info.seconds) == (40, pytest.approx(2.5))


def test_a_claimed_rate_gives_way_to_the_times(tmp_path):
  """Recordings of browsers claim 1000 frames per second."""
  path = tmp_path / "a.webm"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libvpx", rate=1000)
    stream.height = stream.width = 32
    stream.pix_fmt = "yuv420p"
    for i in range(20):
      picture = np.full((32, 32, 3), 10 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      frame.pts, frame.time_base = 40 * i, fractions.Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  info = video.probe(path)
  assert (info.frames, info.fps) == (20, pytest.approx(25))
  assert info.seconds == pytest.approx(0.8)
