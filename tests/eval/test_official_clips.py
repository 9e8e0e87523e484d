"""Clips as the official evaluation reads them, beside its formulas in torch."""

import dataclasses
import fractions

import av
import numpy as np
import PIL.Image
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import video
from dcvideogen_jax.eval import official_clips


@pytest.mark.parametrize(
  ("count", "frames", "expected"),
  [
    (10, 4, [3, 4, 5, 6]),
    (11, 4, [3, 4, 5, 6]),
    (10, 5, [3, 4, 5, 6, 7]),
    (3, 6, [0, 0, 0, 1, 2, 2]),
    (1, 2, [0, 0]),
    (4, 4, [0, 1, 2, 3]),
  ],
)
def test_centre_frames(count, frames, expected):
  assert official_clips.centre(count, frames) == expected


def waves(height, width, seed=0):
  random = np.random.default_rng(seed)
  y, x = np.ogrid[:height, :width]
  planes = [
    np.sin(x / a) + np.cos(y / b) for a, b in random.uniform(2, 9, (3, 2))
  ]
  noise = random.normal(size=(height, width, 3))
  return (
    (128 + 50 * np.stack(planes, -1) + 5 * noise).clip(0, 255).astype("uint8")
  )


def test_a_frame_of_the_right_size_is_kept():
  frame = waves(8, 12)
  assert official_clips.crop(frame, 8, 12) is frame


def halve(frame):
  """Means of two columns, then of two rows, each rounded, upwards halfway."""
  frame = frame.astype(int)
  frame = (frame[:, ::2] + frame[:, 1::2] + 1) // 2
  return (frame[::2] + frame[1::2] + 1) // 2


def test_halving_is_the_mean_of_four_pixels():
  """The bicubic resize to the same size changes nothing."""
  frame = waves(64, 64)
  found = official_clips.crop(frame, 16, 16)
  np.testing.assert_array_equal(found, halve(halve(frame)))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (17, 90), (12, 15)])
def test_the_centre_of_a_bicubic_resize(shape):
  """The shorter side fits, and as much is cut on both sides."""
  height, width = shape
  frame = waves(height, width)
  found = official_clips.crop(frame, 16, 16)
  assert found.shape == (16, 16, 3)
  scale = max(16 / height, 16 / width)
  size = (round(width * scale), round(height * scale))
  resized = np.asarray(
    PIL.Image.fromarray(frame).resize(size, PIL.Image.Resampling.BICUBIC)
  )
  top, left = (size[1] - 16) // 2, (size[0] - 16) // 2
  np.testing.assert_array_equal(
    found, resized[top : top + 16, left : left + 16]
  )


@pytest.mark.parity
@pytest.mark.parametrize("rounding", official_clips.ROUNDINGS)
def test_rounding_is_that_of_torch(rounding):
  import torch

  dtype = getattr(torch, rounding)
  levels = torch.arange(256, dtype=torch.uint8)
  samples = ((levels.float() / 255 - 0.5) / 0.5).to(dtype)
  other = torch.from_numpy(np.random.default_rng(0).uniform(-1.1, 1.1, 10000))
  for given in (samples, other.float().to(dtype)):
    expected = (255 * (given * 0.5 + 0.5) + 0.5).clamp(0, 255).to(torch.uint8)
    found = official_clips.to_levels(given.float().numpy(), rounding)
    np.testing.assert_array_equal(found, expected.numpy())
  found = official_clips.round_truth(levels.numpy(), rounding)
  expected = (255 * (samples * 0.5 + 0.5) + 0.5).clamp(0, 255).to(torch.uint8)
  np.testing.assert_array_equal(found, expected.numpy())
  if rounding == "float32":
    np.testing.assert_array_equal(found, levels)
  else:  # Bright odd levels become the next one.
    odd = np.arange(129, 254, 2)
    np.testing.assert_array_equal(np.flatnonzero(found != levels.numpy()), odd)
    np.testing.assert_array_equal(found[odd], odd + 1)


def plain(path):
  """All frames by FFmpeg's default conversion, which is OpenCV's."""
  with av.open(str(path)) as container:
    return [
      frame.to_ndarray(format="bgr24")[..., ::-1]
      for frame in container.decode(video=0)
    ]


@pytest.mark.parametrize("tagged", [False, True])
def test_frames_are_stored_pixels_in_the_default_conversion(tmp_path, tagged):
  """An untagged high definition with pixels that are not square."""
  path = tmp_path / "a.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
    stream.width, stream.height, stream.pix_fmt = 64, 640, "yuv420p"
    stream.sample_aspect_ratio = fractions.Fraction(3, 2)
    if tagged:
      stream.codec_context.colorspace = 1
    for seed in range(2):
      frame = av.VideoFrame.from_ndarray(waves(640, 64, seed))
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  stored = plain(path)
  assert stored[0].shape == (640, 64, 3)
  frames = [*video.frames(path)]
  assert frames[0].rgb().shape == (640, 96, 3)
  for frame, expected in zip(frames, stored, strict=True):
    np.testing.assert_array_equal(official_clips.as_opencv(frame), expected)
    shown = frame.rgb((640, 64)).astype(int)
    assert np.abs(shown - expected).mean() > 1
  turned = dataclasses.replace(
    frames[0],
    geometry=frames[0].geometry._replace(transposed=True, mirrored=True),
  )
  np.testing.assert_array_equal(
    official_clips.as_opencv(turned), np.rot90(stored[0], -1)
  )


def test_clips_of_a_folder_and_of_a_list(tmp_path):
  frames = np.stack([waves(24, 40, seed) for seed in range(6)])
  (tmp_path / "below").mkdir()
  path = tmp_path / "below" / "a.mp4"
  with video.VideoWriter(path, fps=8, crf=4) as writer:
    writer.write(frames)
  (tmp_path / "list.txt").write_text("below/a.mp4\n\n")
  assert official_clips.listed(tmp_path) == [path]
  assert official_clips.listed(tmp_path / "list.txt") == [path]
  decoded = plain(path)
  clip = official_clips.read(path, 4, 16, 16)
  expected = [official_clips.crop(frame, 16, 16) for frame in decoded[1:5]]
  np.testing.assert_array_equal(clip, expected)
  assert official_clips.read(path, 9, 16, 16).shape == (9, 16, 16, 3)
  first = official_clips.joined(official_clips.pieces(path, 3, 16, 16, True))
  expected = [official_clips.crop(frame, 16, 16) for frame in decoded[:3]]
  np.testing.assert_array_equal(first, expected)
  with pytest.raises(
    errors.UserError, match="6 frames, fewer than the first 7"
  ):
    next(official_clips.pieces(path, 7, 16, 16, True))


def test_lists_that_cannot_be_used(tmp_path):
  with pytest.raises(errors.UserError, match="names no videos"):
    official_clips.listed(tmp_path)
  with pytest.raises(errors.UserError, match="there is no folder or list"):
    official_clips.listed(tmp_path / "none.txt")
  (tmp_path / "list.txt").write_text("gone.mp4")
  with pytest.raises(errors.UserError, match="gone.mp4, which does not exist"):
    official_clips.listed(tmp_path / "list.txt")
