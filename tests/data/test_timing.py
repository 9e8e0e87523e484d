"""Frames by time, from files of any number of frames per second."""

import fractions

import av
import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import timing, video

SPEED = 64  # pixels per second


def _write(path, times):
  """Writes a video of a square in even motion, with frames at `times`."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.height, stream.width, stream.pix_fmt = 32, 256, "yuv420p"
    stream.time_base = stream.codec_context.time_base = fractions.Fraction(
      1, 90000
    )
    for t in times:
      picture = np.full((32, 256, 3), 20, np.uint8)
      x = round(8 + SPEED * t)
      picture[8:24, x : x + 16] = 230
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      frame.pts = round(t * 90000)
      frame.time_base = stream.time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def _phone():
  """Returns uneven times of a phone: 30 frames per second, 15 in the dark."""
  rng = np.random.default_rng(0)
  gaps = np.where(np.arange(60) % 30 < 15, 1 / 30, 1 / 15)
  return np.concatenate([[0], np.cumsum(gaps + rng.normal(0, 0.002, 60))])


TIMES = {f"{n} fps": np.arange(2.5 * n) / n for n in (60, 30, 24, 16, 8)}
TIMES["phone"] = _phone()


@pytest.fixture(scope="module", params=TIMES)
def filmed(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("filmed") / "a.mp4"
  return _write(path, TIMES[request.param]), TIMES[request.param]


def _place(picture):
  return np.where(picture[16, :, 0] > 128)[0].mean()


def test_things_move_as_fast_as_in_the_file(filmed):
  path, times = filmed
  info = video.probe(path)
  shown = [*timing.frames(path, info, 16.0)]
  # An mp4's index does not say to the millisecond when uneven frames are shown.
  uneven = times is TIMES["phone"]
  assert abs(len(shown) - timing.count(info, 16.0)) <= uneven
  assert abs(len(shown) - 16 * (times[-1] + 1 / info.fps)) <= 0.51 + uneven
  places = np.array([_place(frame.rgb()) for frame in shown])
  # No frame of the file is nearer in time.
  wanted = np.arange(len(shown)) / 16
  found = np.array([frame.seconds for frame in shown])
  least = np.abs(times[:, None] - wanted).min(0)
  assert np.abs(found - wanted).max() <= least.max() + 2e-3
  assert (np.abs(found - wanted) <= least + 2e-3).all()
  speed = (places[-1] - places[0]) / (found[-1] - found[0])
  assert speed == pytest.approx(SPEED, rel=0.02)
  steps = np.diff(places)
  assert steps.mean() == pytest.approx(SPEED / 16, abs=0.12)
  assert found[0] == 0 and (np.diff(found) >= 0).all()


def test_a_file_of_16_is_taken_as_it_is_and_any_by_none(filmed):
  path, times = filmed
  info = video.probe(path)
  whole = [frame.seconds for frame in video.frames(path)]
  assert [x.seconds for x in timing.frames(path, info, None)] == whole
  assert timing.count(info, None) == len(whole) == len(times)
  if info.fps == 16:
    assert [x.seconds for x in timing.frames(path, info, 16.0)] == whole


def test_times_in_milliseconds_do_not_make_a_frame_come_twice(tmp_path):
  times = np.arange(40) / 16
  path = _write(tmp_path / "a.mkv", times)
  info = video.probe(path)
  found = [frame.seconds for frame in timing.frames(path, info, 16.0)]
  assert len(set(found)) == len(found) == 40


@pytest.mark.parametrize(
  ("text", "fps"), [("16", 16.0), ("23.976", 23.976), ("file", None)]
)
def test_numbers_of_frames_per_second(text, fps):
  assert timing.parse(text, "--fps") == fps


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "", "files"])
def test_what_is_no_number_of_frames_per_second(text):
  with pytest.raises(errors.UserError, match=f"--fps must be .*{text!r}"):
    timing.parse(text, "--fps")


def test_repetition_is_told(tmp_path):
  path = _write(tmp_path / "a.mp4", np.arange(8) / 8)
  with pytest.warns(UserWarning, match="slow has 8 frames .*, fewer than 16"):
    timing.tell("slow", video.probe(path), 16.0)
  unknown = video.VideoInfo(32, 32, 0.0, 5, 0.0, None)
  with pytest.warns(UserWarning, match="raw does not tell how many frames"):
    timing.tell("raw", unknown, 16.0)
  assert timing.count(unknown, 16.0) == 5
