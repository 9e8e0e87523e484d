"""Cuts are found, clips do not cross them, and photographs move."""

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import video
from dcvideogen_jax.tiny import clips, pans


def _shot(frames, seed, height=40, width=56, speed=1.0, noise=0):
  """Makes a moving pattern, different for every seed."""
  rng = np.random.default_rng(seed)
  base, wave = rng.uniform(40, 215, 3), rng.uniform(0.1, 0.3, (2, 3))
  t, y, x = np.mgrid[:frames, :height, :width][..., None]
  shot = base + 30 * np.sin(wave[0] * y + wave[1] * x + 0.2 * speed * t)
  return np.clip(shot + rng.normal(0, noise, shot.shape), 0, 255).astype(
    np.uint8
  )


def _save(path, frames):
  with video.VideoWriter(path, crf=5) as writer:
    writer.write(frames)
  return path


@pytest.mark.parametrize(
  "lengths", [(20,), (9, 14), (1, 12, 7, 30), (10, 1, 10), (1,)]
)
def test_scenes_are_split_at_cuts(lengths):
  # With these seeds, shots differ by more than frames within a shot.
  shots = [
    _shot(n, seed) for n, seed in zip(lengths, (0, 4, 2, 5), strict=False)
  ]
  edges = np.cumsum((0, *lengths)).tolist()
  assert clips.scenes(np.concatenate(shots)) == list(
    zip(edges[:-1], edges[1:], strict=True)
  )


@pytest.mark.parametrize(
  "whole",
  [
    _shot(30, 1, speed=6),
    _shot(30, 1, noise=30),
    np.linspace(0, 255, 30).astype(np.uint8)[:, None, None, None]
    * np.ones((1, 20, 30, 3), np.uint8),
    np.random.default_rng(0).integers(0, 256, (30, 1, 1, 3), np.uint8)
    * np.ones((1, 20, 30, 1), np.uint8),
  ],
  ids=["fast", "noisy", "fade", "flicker"],
)
def test_motion_noise_and_fades_are_no_cuts(whole):
  assert clips.scenes(whole) == [(0, 30)]


def test_motion_measures_change_but_not_noise():
  still = _shot(6, 1, 96, 96, speed=0)
  assert clips.motion(still) == 0 == clips.motion(still[:1])
  noisy = _shot(6, 1, 96, 96, speed=0, noise=2)
  assert clips.motion(noisy) < clips.STILL
  assert np.abs(np.diff(noisy.astype(int), axis=0)).mean() > 2
  slow, fast = (clips.motion(_shot(6, 1, 96, 96, speed=s)) for s in (1, 2))
  assert clips.STILL < slow < fast
  ramp = np.arange(0, 50, 5, dtype=np.uint8)[:, None, None, None]
  assert clips.motion(np.broadcast_to(ramp, (10, 48, 48, 3))) == 5


def _sample(path, count=12, seed=0, **options):
  options = {"frames": 6, "size": 24, "short_sides": (24, 32)} | options
  rng = np.random.default_rng(seed)
  return list(clips.sample(path, rng, count, **options))


@pytest.fixture(scope="module")
def two_shots(tmp_path_factory):
  """20 frames of one shot, 25 of another."""
  path = tmp_path_factory.mktemp("shots") / "shots.mp4"
  return _save(path, np.concatenate([_shot(20, 0), _shot(25, 4)]))


def test_sampling_is_reproducible_and_never_repeats(two_shots):
  one, again, other = (_sample(two_shots, seed=seed) for seed in (0, 0, 1))
  assert len(one) == 12
  assert all(c.shape == (6, 24, 24, 3) and c.dtype == np.uint8 for c in one)
  np.testing.assert_array_equal(one, again)
  assert np.any(np.array(one) != np.array(other))
  assert len({c.tobytes() for c in one}) == 12


@pytest.mark.parametrize("strides", [(1,), (1, 2, 3)])
def test_no_clip_crosses_a_cut(two_shots, strides):
  for clip in _sample(two_shots, 30, strides=strides):
    assert clips.scenes(clip) == [(0, 6)]
    assert np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3)).max() < 25


def test_strides_take_every_nth_frame(tmp_path):
  """Frames that show their own number."""
  path = _save(
    tmp_path / "a.mp4",
    np.broadcast_to(
      (5 * np.arange(40, dtype=np.uint8))[:, None, None, None], (40, 32, 32, 3)
    ),
  )
  found = set()
  for clip in _sample(path, 20, strides=(1, 3), short_sides=(32,)):
    numbers = np.rint(clip.mean((1, 2, 3)) / 5).astype(int)
    steps = set(np.diff(numbers).tolist())
    assert len(steps) == 1
    found |= steps
  assert found == {1, 3}


def test_still_clips_are_rare(tmp_path):
  """The left half stands still, the right half moves."""
  whole = _shot(60, 3, 48, 200, speed=2)
  whole[:, :, :100] = whole[:1, :, :100]
  path = _save(tmp_path / "a.mp4", whole)
  levels = {
    share: np.array(
      [
        clips.motion(c)
        for c in _sample(path, 60, short_sides=(48,), still_share=share)
      ]
    )
    for share in (0.0, 1.0)
  }
  assert (levels[0.0] >= clips.STILL).all()
  assert (levels[1.0] < clips.STILL).mean() > 0.25


def test_a_video_too_still_gives_fewer(tmp_path):
  path = _save(tmp_path / "a.mp4", _shot(10, 1, speed=0))
  assert _sample(path, 8, still_share=0.0) == []


def test_small_videos_are_not_enlarged_if_that_can_be_helped(
  two_shots, monkeypatch
):
  sizes = []
  real = video.read_frames
  monkeypatch.setattr(
    video,
    "read_frames",
    lambda p, size: sizes.append(size) or real(p, size=size),
  )
  _sample(two_shots, 4, short_sides=(24, 32, 64))
  _sample(two_shots, 4, short_sides=(64, 96), size=48)
  assert sizes == [(24, 34), (32, 45), (64, 90)]


def test_a_video_without_a_long_enough_scene_is_told(two_shots):
  with pytest.raises(errors.UserError, match="no scene of 26 frames: 45"):
    _sample(two_shots, frames=26)


def _photo(height=200, width=300, seed=1):
  """Makes a smooth random picture with fine grain."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width][..., None]
  waves = sum(
    np.sin(rng.uniform(-0.1, 0.1, 3) * y + rng.uniform(-0.1, 0.1, 3) * x)
    for _ in range(4)
  )
  noise = rng.normal(0, 4, (height, width, 3))
  return np.clip(127 + 30 * waves + noise, 0, 255).astype(np.uint8)


def test_ken_burns_shape_and_seed():
  image = _photo()
  one = pans.ken_burns(image, 5, 6, 48, 64)
  assert one.shape == (6, 48, 64, 3) and one.dtype == np.uint8
  np.testing.assert_array_equal(one, pans.ken_burns(image, 5, 6, 48, 64))
  assert (one != pans.ken_burns(image, 6, 6, 48, 64)).any()


@pytest.mark.parametrize(
  "shape", [(48, 64), (49, 300), (500, 64), (2000, 2100)]
)
def test_ken_burns_takes_any_large_enough_image(shape):
  image = np.full((*shape, 3), (10, 100, 200), np.uint8)
  for seed in range(12):
    clip = pans.ken_burns(image, seed, 5, 48, 64)
    assert (clip == np.array((10, 100, 200), np.uint8)).all()


def test_ken_burns_refuses_a_small_image():
  with pytest.raises(ValueError, match="smaller"):
    pans.ken_burns(_photo(40, 100), 0, 4, 48, 64)


def test_ken_burns_stays_inside_and_moves():
  """The photograph's pixels are their own coordinates."""
  y, x = np.mgrid[:256, :256]
  image = np.stack([y, x, 0 * x], -1).astype(np.uint8)
  moved = 0
  for seed in range(20):
    clip = pans.ken_burns(image, seed, 8, 32, 32).astype(int)
    steps = np.diff(clip[..., :2], axis=0)
    assert np.abs(steps).max() < 60
    moved += np.abs(steps).mean() > 0.1
    # The first and the last row are apart by a scale of at least 0.75 pixels.
    rows = np.hypot(*np.moveaxis(clip[:, 31, 0] - clip[:, 0, 0], -1, 0)[:2])
    assert (rows > 0.7 * 31).all() and (rows < 256).all()
  assert moved >= 18


def test_ken_burns_does_not_alias():
  """A fine checkerboard seen from afar is grey."""
  y, x = np.mgrid[:1024, :1024]
  image = np.repeat((255 * ((x + y) % 2))[..., None], 3, -1).astype(np.uint8)
  contrast = []
  for seed in range(12):
    _, scales, _ = pans._camera(
      np.random.default_rng(seed), image.shape, 2, 32, 32
    )
    if scales.min() >= 2:
      contrast.append(pans.ken_burns(image, seed, 2, 32, 32).std())
  assert len(contrast) > 3 and max(contrast) < 70 and np.median(contrast) < 20
