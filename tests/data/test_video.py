"""Reading videos: size, rotation, start, and one frame at a time."""

import av
import numpy as np
import PIL.Image
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import pixels, video


@pytest.mark.parametrize("size", [(24, 32), (31, 17), (96, 128)])
def test_resizing_follows_the_picture(tmp_path, size):
  path = recordings.write(tmp_path / "a.mp4", recordings.clip(3), crf=1)
  small = recordings.read(path, size=size)
  assert small.shape == (3, *size, 3)
  for frame, whole in zip(small, recordings.read(path), strict=True):
    expected = PIL.Image.fromarray(whole).resize(
      size[::-1], PIL.Image.Resampling.BICUBIC
    )
    assert np.abs(frame.astype(int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), (7, 7), (99, 12)])
def test_max_frames(tmp_path, most, found):
  path = recordings.write(tmp_path / "a.mp4", recordings.clip(12))
  assert len(list(video.read_frames(path, max_frames=most))) == found


@pytest.mark.parametrize("first", [1, 7, 23])
def test_start_is_exact(noisy, first):
  whole = recordings.read(noisy)
  np.testing.assert_array_equal(
    recordings.read(noisy, start=first / 16, max_frames=5),
    whole[first : first + 5],
  )


def test_start_after_the_end_is_told(noisy):
  with pytest.raises(errors.UserError, match="from second 100 on"):
    recordings.read(noisy, start=100)


def test_frames_come_one_by_one(noisy, monkeypatch):
  made = []
  real = pixels.to_rgb
  monkeypatch.setattr(pixels, "to_rgb", lambda *a: made.append(0) or real(*a))
  frames = video.read_frames(noisy)
  next(frames), next(frames)
  assert len(made) == 2


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_honoured(tmp_path, turns):
  clip = recordings.clip(3, 32, 64)
  upright = recordings.read(recordings.write(tmp_path / "plain.mp4", clip))
  path = tmp_path / "turned.mp4"
  with (
    av.open(str(tmp_path / "plain.mp4")) as source,
    av.open(str(path), "w") as target,
  ):
    stream = target.add_stream_from_template(source.streams.video[0])
    stream.set_display_rotation(90 * turns)
    for packet in source.demux(source.streams.video[0]):
      if packet.dts is not None:
        packet.stream = stream
        target.mux(packet)
  back = recordings.read(path)
  np.testing.assert_array_equal(back, np.rot90(upright, turns, (1, 2)))
  info = video.probe(path)
  assert (info.height, info.width) == back.shape[1:3]
  assert recordings.read(path, size=(40, 20)).shape == (3, 40, 20, 3)


def test_frames_are_counted_when_the_container_does_not_say(tmp_path):
  frames = [PIL.Image.fromarray(f) for f in recordings.clip(7)]
  path = tmp_path / "a.gif"
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)
  info = video.probe(path)
  assert (info.frames, info.fps) == (7, pytest.approx(25))
  assert len(recordings.read(path)) == 7


def test_an_image_is_a_video_of_one_frame(tmp_path):
  picture = recordings.clip(1)[0]
  PIL.Image.fromarray(picture).save(tmp_path / "a.png")
  np.testing.assert_array_equal(
    recordings.read(tmp_path / "a.png"), picture[None]
  )


def test_frames_keep_the_size_of_the_first(tmp_path):
  """Two recordings behind each other, as a transport stream may be."""
  recordings.encode(tmp_path / "a.ts", 5, 32, 48)
  recordings.encode(tmp_path / "b.ts", 5, 64, 32)
  path = tmp_path / "both.ts"
  path.write_bytes(
    (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
  )
  with pytest.warns(UserWarning, match="changes its size at frame 5, to 64x32"):
    assert recordings.read(path).shape == (10, 32, 48, 3)


def test_a_recording_of_unknown_length_is_read(tmp_path):
  path = tmp_path / "a.mkv"
  recordings.encode(path, 8, options={"live": "1"})
  assert len(recordings.read(path)) == 8
