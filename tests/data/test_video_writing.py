"""Writing videos: any size, colours, atomic, loud when the disk is full."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import warnings

import av
import numpy as np
import pytest
import recordings

from dcvideogen_jax import errors
from dcvideogen_jax.data import video


@pytest.mark.parametrize(
  "size", [(48, 64), (47, 64), (48, 63), (47, 63), (2, 2), (1, 1), (16, 130)]
)
def test_any_size_comes_back_as_asked(tmp_path, size):
  clip = recordings.clip(5, *size)
  path = recordings.write(tmp_path / "a.mp4", clip, crf=1)
  back = recordings.read(path)
  assert back.shape == clip.shape and back.dtype == np.uint8
  # 4:2:0 shares one colour among four pixels; odd sizes keep 4:4:4.
  error = np.abs(back.astype(int) - clip).mean()
  assert error < (2 if size[0] % 2 or size[1] % 2 else 10)
  info = video.probe(path)
  assert (info.height, info.width, info.frames) == (*size, 5)


@pytest.mark.parametrize(
  "colour", [(255, 0, 0), (0, 200, 30), (13, 17, 240), (255, 255, 255)]
)
@pytest.mark.parametrize("width", [32, 33])
def test_colours_survive(tmp_path, colour, width):
  clip = np.full((3, 32, width, 3), colour, np.uint8)
  back = recordings.read(recordings.write(tmp_path / "a.mp4", clip))
  assert np.abs(back.astype(int) - clip).max() <= 3


def test_writes_of_any_length_append(tmp_path):
  clip = recordings.clip(9)
  with video.VideoWriter(tmp_path / "a.mp4") as writer:
    for part in (clip[:1], clip[1:1], clip[1:4], clip[4:]):
      writer.write(part)
  recordings.write(tmp_path / "b.mp4", clip)
  np.testing.assert_array_equal(
    recordings.read(tmp_path / "a.mp4"), recordings.read(tmp_path / "b.mp4")
  )


@pytest.mark.parametrize("fps", [16, 24000 / 1001, 59.94, 0.5])
def test_fps_and_comment_come_back(tmp_path, fps):
  comment = json.dumps({"prompt": "élan “x”", "seed": 3})
  path = recordings.write(
    tmp_path / "a.mp4", recordings.clip(4), fps=fps, comment=comment
  )
  info = video.probe(path)
  assert info.fps == pytest.approx(fps, rel=1e-4)
  assert json.loads(info.comment) == json.loads(comment)


def test_index_comes_first_for_streaming(tmp_path):
  content = recordings.write(tmp_path / "a.mp4", recordings.clip()).read_bytes()
  assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_only_uint8_is_written(tmp_path, dtype):
  path = tmp_path / "a.mp4"
  with pytest.raises(TypeError, match="uint8"):
    recordings.write(path, recordings.clip().astype(dtype))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 8, 8, 4), (1, 0, 8, 3)])
def test_only_rgb_frames_are_written(tmp_path, shape):
  with pytest.raises(ValueError, match="frames must be"):
    recordings.write(tmp_path / "a.mp4", np.zeros(shape, np.uint8))
  assert list(tmp_path.iterdir()) == []


def test_frames_must_keep_their_size(tmp_path):
  with (
    pytest.raises(ValueError, match="32x48 after frames of 48x32"),
    video.VideoWriter(tmp_path / "a.mp4") as writer,
  ):
    writer.write(recordings.clip(2, 48, 32))
    writer.write(recordings.clip(2, 32, 48))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "options", [{"fps": 0}, {"fps": float("nan")}, {"crf": 52}, {"crf": -1}]
)
def test_bad_options_are_told(tmp_path, options):
  with pytest.raises(errors.UserError, match=next(iter(options))):
    video.VideoWriter(tmp_path / "a.mp4", **options)


def test_other_suffixes_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match=r"\.mp4"):
    video.VideoWriter(tmp_path / "a.gif")


def test_no_frames_leave_no_file(tmp_path):
  with pytest.raises(errors.UserError, match="no frames were written"):
    recordings.write(tmp_path / "a.mp4", recordings.clip()[:0])
  assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_old_file(tmp_path):
  path = recordings.write(tmp_path / "a.mp4", recordings.clip(3))
  before = path.read_bytes()
  with pytest.raises(KeyError), video.VideoWriter(path) as writer:
    writer.write(recordings.clip(5))
    raise KeyError("the caller's")
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_unusable_folder_is_told(tmp_path, parent):
  (tmp_path / "file").write_text("x")
  with pytest.raises(errors.UserError, match="cannot write"):
    recordings.write(tmp_path / parent / "a.mp4", recordings.clip(2))


_LIMITED = """
import resource, sys
import numpy as np
from dcvideogen_jax import errors
from dcvideogen_jax.data import video
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rng = np.random.default_rng(0)
try:
  with video.VideoWriter(sys.argv[1], crf=10) as writer:
    for _ in range(int(sys.argv[3])):
      writer.write(rng.integers(0, 256, (4, 64, 64, 3), np.uint8))
except errors.UserError as e:
  print(e)
  sys.exit(2)
"""


# The last limits are met only when the index is moved to the front.
@pytest.mark.parametrize("limit", [0, 100, 20_000, -1, -200])
def test_a_file_size_limit_is_told_and_leaves_nothing(tmp_path, limit):
  path = tmp_path / "a.mp4"
  rounds = "3"

  def run(limit):
    return subprocess.run(
      [sys.executable, "-c", _LIMITED, path, str(limit), rounds],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
    )

  if limit < 0:
    assert run(10**8).returncode == 0
    limit += path.stat().st_size
    path.unlink()
  result = run(limit)
  assert result.returncode == 2, result.stderr
  assert result.stdout.startswith(f"cannot write {path}")
  assert result.stdout.count("\n") == 1 and result.stderr == ""
  assert list(tmp_path.iterdir()) == []


def test_a_write_that_libav_does_not_notice_is_noticed(tmp_path, monkeypatch):
  close = av.container.OutputContainer.close

  def lossy_close(container):
    close(container)
    content = pathlib.Path(container.name).read_bytes()
    pathlib.Path(container.name).write_bytes(content[: len(content) // 2])

  class Lossy:
    def __init__(self, container):
      self._container = container

    def __getattr__(self, name):
      return getattr(self._container, name)

    def close(self):
      lossy_close(self._container)

  real = av.open
  monkeypatch.setattr(
    av,
    "open",
    lambda *a, **k: Lossy(real(*a, **k)) if "w" in a[1:] else real(*a, **k),
  )
  with pytest.raises(errors.UserError, match="only 0 of 12 frames"):
    recordings.write(tmp_path / "a.mp4", recordings.clip())
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(tmp_path, monkeypatch):
  def full(*_args, **_options):
    raise av.error.OSError(errno.ENOSPC, "No space left on device")

  with (
    pytest.raises(errors.UserError, match="cannot write .*No space left"),
    video.VideoWriter(tmp_path / "a.mp4") as writer,
  ):
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", full)
    writer.write(recordings.clip(2))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("crf", "width", "kind"),
  [(1, 32, None), (18, 32, None), (0, 32, "without loss"), (18, 31, "odd")],
)
def test_what_browsers_do_not_play_is_told(tmp_path, crf, width, kind):
  frames = recordings.clip(3)[:, :32, :width]
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    path = recordings.write(tmp_path / "a.mp4", frames, crf=crf)
  with av.open(str(path)) as container:
    profile = container.streams.video[0].codec_context.profile
  if kind is None:
    assert profile == "High" and not told
  else:
    assert profile == "High 4:4:4 Predictive"
    assert kind in str(told[0].message) and "a.mp4" in str(told[0].message)


def test_the_same_frames_are_the_same_file(tmp_path):
  """x264's output does not depend on the memory that MALLOC_PERTURB_ fills."""
  write = """
import sys
import numpy as np
from dcvideogen_jax.data import video
t, y, x = np.ogrid[:16, :112, :112]
waves = [np.sin((x + 3 * t) / a) + np.cos((y - 2 * t) / b)
         for a, b in ((5, 9), (7, 4), (11, 6))]
noise = np.random.default_rng(0).normal(size=(16, 112, 112, 3))
fading = (0.6 + 0.4 * np.cos(t / 3))[..., None]
frames = 128 + 60 * np.stack(waves, -1) * fading + 3 * noise
with video.VideoWriter(sys.argv[1]) as writer:
  writer.write(np.clip(frames, 0, 255).astype(np.uint8))
"""
  found = set()
  for perturb in ("0", "1", "85"):
    path = tmp_path / f"{perturb}.mp4"
    subprocess.run(
      [sys.executable, "-c", write, str(path)],
      env={**os.environ, "MALLOC_PERTURB_": perturb},
      check=True,
    )
    found.add(path.read_bytes())
  assert len(found) == 1
