"""Batches of clips from folders of videos: where they are cut, and damage."""

import json
import shutil

import numpy as np
import pytest
import takes

from dcvideogen_jax import errors
from dcvideogen_jax.data import pipeline, probing, random_clips, video


def test_videos_are_read_at_random_places_and_scales(folder, monkeypatch):
  calls = []
  real = video.read_frames

  def recorded(path, **options):
    calls.append((path.name, options["start"], options["size"]))
    return real(path, **options)

  monkeypatch.setattr(video, "read_frames", recorded)
  config = {"source": "videos", "path": folder, **takes.SIZE, "max_stride": 3}
  takes.take(config, 30, num_threads=0)
  names = [name for name, *_ in calls]
  assert names.count("b.mp4") > 5 * names.count("a.mp4") > 0
  starts = [start for name, start, _ in calls if name == "b.mp4"]
  assert min(starts) < 2 and max(starts) > 8
  heights = {size[0] for *_, size in calls}
  assert min(heights) >= 16 and max(heights) <= 33 and len(heights) > 8
  for *_, (height, width) in calls:
    assert width == pytest.approx(1.5 * height, abs=1)


def test_strides_of_videos(tmp_path):
  """Frames that show their own number."""
  numbers = 5 * np.arange(40, dtype=np.uint8)[:, None, None, None]
  with video.VideoWriter(tmp_path / "a.mp4") as writer:
    writer.write(np.broadcast_to(numbers, (40, 32, 48, 3)))
  config = {"source": "videos", "path": tmp_path, **takes.SIZE, "max_stride": 3}
  clips = np.concatenate(takes.take(config, 10)).mean((2, 3, 4)) / 5
  steps = np.diff(np.rint(clips).astype(int), axis=1)
  assert (steps == steps[:, :1]).all()
  assert set(steps[:, 0].tolist()) == {1, 2, 3}


def test_a_folder_without_videos_is_told(tmp_path):
  config = {"source": "videos", "path": tmp_path, **takes.SIZE}
  with pytest.raises(errors.UserError, match="has no .mp4"):
    takes.take(config, 1)


def test_a_video_is_listed_once_for_each_second(folder):
  files = random_clips._VideoFiles(folder, frames=2)
  assert [*files] == [0] + 11 * [1]
  for index in (-1, 12):
    with pytest.raises(IndexError, match=f"has 12 elements, .* {index}"):
      files[index]


def test_a_damaged_video_is_told(tmp_path):
  (tmp_path / "a.mp4").write_text("not a video")
  config = {"source": "videos", "path": tmp_path, **takes.SIZE}
  with pytest.raises(errors.UserError, match="a.mp4 is not a readable video"):
    takes.take(config, 1)


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
  (tmp_path / "set" / "inner").mkdir(parents=True)
  (tmp_path / "elsewhere").mkdir()
  for name in ("set/a.mp4", "set/inner/.b.mp4", "elsewhere/c.MP4"):
    (tmp_path / name).touch()
  (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "set" / "inner" / "loop").symlink_to(tmp_path / "set")
  (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
  (tmp_path / "set" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
  found = probing.video_names(tmp_path / "set")
  assert found == ["a.mp4", "gone.mp4", "link/c.MP4"]


def test_videos_of_phones_and_camcorders_are_found(tmp_path):
  names = ["a.m4v", "b.MTS", "c.3gp", "d.mpeg", "e.ts", "f.wmv"]
  for name in (*names, "a.txt", "a.webp"):
    (tmp_path / name).touch()
  assert probing.video_names(tmp_path) == names


def test_a_damaged_and_a_short_video_are_left_out(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "videos")
  (tmp_path / "videos" / "c.mp4").write_text("not a video")
  (tmp_path / "videos" / "._b.mp4").write_text("of another file system")
  config = {"source": "videos", "path": tmp_path / "videos", **takes.SIZE}
  config["frames"] = 17
  words = (
    "2 of 3 videos .*a.mp4 has 16 frames, fewer than the 17 .*c.mp4 is not"
  )
  with pytest.warns(UserWarning, match=words):
    assert len(takes.take(config, 20)) == 20
  with pytest.raises(errors.UserError, match="no video of .* can be used"):
    takes.take(config | {"frames": 177}, 1)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_video_that_breaks_off_is_replaced_in_every_run_alike(
  folder, tmp_path, monkeypatch, threads
):
  """b.mp4 breaks off at second 3; clips from before are still used."""
  real = video.frames

  def frames(path, *, start=0.0):
    for frame in real(path, start=start):
      if path.name == "b.mp4" and frame.seconds > 3:
        raise errors.UserError(f"{path} is damaged")
      yield frame

  monkeypatch.setattr(video, "frames", frames)
  config = {"source": "videos", "path": folder, **takes.SIZE}
  with pytest.warns(UserWarning, match="b.mp4 is left out") as told:
    whole = takes.take(config, 12, num_threads=threads)
  assert any("clips of 1 videos" in str(w.message) for w in told)
  iterator = pipeline.batches(config, batch_size=3, seed=0)
  with pytest.warns(UserWarning, match="b.mp4 is left out"):
    for _ in range(5):
      next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    again = pipeline.batches(config, batch_size=3, seed=0, num_threads=1)
    again.set_state(state)
    found = [next(again)["video"] for _ in range(7)]
    again.close()
  np.testing.assert_array_equal(found, whole[5:])
