"""The scorer reads clips, blurred or noisy ones too, and notices wrong ones."""

import time

import numpy as np
import pytest

from dcvideogen_jax.tiny import scorer, world

SPLITS = pytest.mark.parametrize("split", world.SPLITS)


def _clips(split, count, frames=16, height=64, width=64, first=0):
  """Returns scenes and videos of a sequence that no training uses."""
  found = [
    world.clip(split, first + i, 99, frames, height, width)
    for i in range(count)
  ]
  return [scene for scene, *_ in found], [video for *_, video in found]


def _read(videos):
  return [scorer.read(video) for video in videos]


def _degraded(video, sigma, noise, rng):
  """Blurs by a Gaussian of `sigma` pixels, and adds `noise` levels of noise."""
  blurred = video.astype(np.float32)
  for axis, extent in ((1, video.shape[1]), (2, video.shape[2])):
    at = np.arange(extent)
    kernel = np.exp(-np.square((at[:, None] - at) / sigma) / 2)
    kernel = (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
    blurred = np.moveaxis(np.tensordot(kernel, blurred, (1, axis)), 0, axis)
  noisy = blurred + noise * rng.standard_normal(video.shape, np.float32)
  return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@SPLITS
@pytest.mark.parametrize("frames", [13, 16])
def test_rendered_clips_are_read(split, frames):
  scenes, videos = _clips(split, 100, frames, first=1000)
  assert scorer.score(_read(videos), scenes)["all"] >= 0.99


@pytest.mark.parametrize(
  ("first", "height", "width"),
  [(16, 64, 64), (48, 64, 64), (240, 64, 64), (40, 64, 96), (48, 112, 64)],
)
def test_later_clips_show_what_has_come_to_rest(first, height, width):
  scenes, videos = _clips("heldout", 100, first + 16, height, width)
  scenes = [world.later(scene, first, height, width) for scene in scenes]
  readings = _read([video[first:] for video in videos])
  assert scorer.score(readings, scenes)["all"] >= 0.99


@SPLITS
@pytest.mark.parametrize(("sigma", "noise"), [(1.0, 8), (1.5, 8)])
def test_blur_and_noise_are_seen_through(split, sigma, noise):
  scenes, videos = _clips(split, 64, 13)
  rng = np.random.default_rng(0)
  videos = [_degraded(video, sigma, noise, rng) for video in videos]
  assert scorer.score(_read(videos), scenes)["all"] >= 0.97


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("background", ["ocean", "paper"])
def test_much_blur_mixes_colours_but_does_not_rename_them(colour, background):
  rng = np.random.default_rng(0)
  for shape in ("cross", "ring"):
    scene = world.Scene(colour, shape, "small", "still", background)
    for seed in range(4):
      video = world.render(scene, seed, 4)
      reading = scorer.read(_degraded(video, 3.0, 4, rng))
      assert reading.colour == colour


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_few_frames_show_colour_and_shape(frames):
  scenes, videos = _clips("train", 80, frames)
  readings = _read(videos)
  found = scorer.score(readings, scenes)
  assert found["colour"] >= 0.99 and found["shape"] >= 0.99
  if frames == 1:
    assert {reading.motion for reading in readings} == {None}
    assert found["motion"] == found["all"] == 0
  else:
    assert found["motion"] > 0.9


@pytest.mark.parametrize("size", [(40, 64, 64), (16, 96, 160), (16, 128, 80)])
def test_other_sizes_and_long_clips(size):
  scenes, videos = _clips("train", 40, *size)
  assert scorer.score(_read(videos), scenes)["all"] >= 0.97


def test_wrong_scenes_score_near_chance():
  scenes, videos = _clips("heldout", 200, 13)
  order = np.random.default_rng(1).permutation(200)
  found = scorer.score(_read(videos), [scenes[i] for i in order])
  assert found["colour"] == pytest.approx(1 / 7, abs=0.08)
  assert found["shape"] == pytest.approx(1 / 5, abs=0.08)
  assert found["motion"] == pytest.approx(1 / 7, abs=0.08)
  assert found["all"] < 0.03


@pytest.mark.parametrize("field", scorer.Reading._fields)
def test_one_wrong_fact_is_told(field):
  """With one fact of a clip changed, only that reading changes."""
  table = {
    "colour": list(world.COLOURS),
    "shape": list(world.SHAPES),
    "motion": list(world.MOTIONS),
  }[field]
  scene = world.Scene("green", "square", "large", "left", "desert")
  for name in table:
    shown = scene._replace(**{field: name})
    found = scorer.score([scorer.read(world.render(shown, 7))], [scene])
    same = float(name == getattr(scene, field))
    expected = {"colour": 1.0, "shape": 1.0, "motion": 1.0}
    assert found == expected | {field: same, "all": same}


def test_backwards_is_the_opposite_motion():
  opposite = {"left": "right", "up": "down", "grows": "shrinks"}
  opposite |= {b: a for a, b in opposite.items()} | {"still": "still"}
  scenes, videos = _clips("train", 60)
  for scene, reading in zip(
    scenes, _read(v[::-1] for v in videos), strict=True
  ):
    assert reading.motion == opposite[scene.motion]


def test_turned_pictures_move_another_way():
  turned = {"left": "down", "down": "right", "right": "up", "up": "left"}
  scenes, videos = _clips("train", 60)
  for scene, video in zip(scenes, videos, strict=True):
    reading = scorer.read(np.rot90(video, axes=(1, 2)))
    assert reading.motion == turned.get(scene.motion, scene.motion)
    assert reading.colour == scene.colour


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_an_empty_background_shows_nothing(background):
  scene = world.Scene("red", "circle", "small", "still", background)
  video = world.render(scene, 0)
  grey = np.median(video, (0, 1, 2)).astype(int)
  noise = np.random.default_rng(0).normal(0, 8, video.shape)
  empty = np.clip(grey + noise, 0, 255).astype(np.uint8)
  assert scorer.read(empty) == scorer.NOTHING
  assert scorer.read(video) != scorer.NOTHING


def test_noise_and_outlines_of_no_shape_are_told():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (16, 64, 64, 3), np.uint8)
  assert scorer.read(noise).shape is None
  bars = np.full((16, 64, 64, 3), 128, np.uint8)
  bars[:, 10:54, 20:24] = bars[:, 10:54, 40:44] = world.COLOURS["red"]
  reading = scorer.read(bars)
  assert reading == scorer.Reading("red", None, "still")


def test_a_shape_in_less_than_half_of_the_frames_is_none():
  scene = world.Scene("blue", "ring", "large", "right", "fog")
  video = world.render(scene, 5)
  ground = np.median(video, (0, 1, 2)).astype(np.uint8)
  for gone, expected in ((6, ("blue", "ring", "right")), (10, (None,) * 3)):
    partly = video.copy()
    partly[:gone] = ground
    assert scorer.read(partly) == expected


def test_score_counts_each_fact():
  scenes = [
    world.Scene("red", "ring", "small", "up", "fog"),
    world.Scene("blue", "cross", "large", "still", "road"),
    world.Scene("cyan", "square", "large", "grows", "lake"),
    world.Scene("pink", "circle", "small", "left", "ocean"),
  ]
  readings = [
    scorer.Reading("red", "ring", "up"),
    scorer.Reading("blue", "circle", "still"),
    scorer.Reading("red", "square", "shrinks"),
    scorer.NOTHING,
  ]
  found = scorer.score(readings, scenes)
  assert found == {"colour": 0.5, "shape": 0.5, "motion": 0.5, "all": 0.25}


def test_mistakes_are_told(wrong_shapes):
  scenes, videos = _clips("train", 2, 2)
  with pytest.raises(TypeError, match="uint8, not float32"):
    scorer.read(videos[0].astype(np.float32))
  with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
    scorer.read(videos[0][0])
  with pytest.raises(ValueError, match="shows no shape"):
    scorer.read(videos[0][:, :1])
  with pytest.raises(ValueError, match="no readings"):
    scorer.score([], [])
  with pytest.raises(ValueError, match="longer"):
    scorer.score(_read(videos)[:1], scenes)


def test_two_hundred_clips_take_seconds():
  _, videos = _clips("train", 20)
  scorer.read(videos[0])
  start = time.process_time()
  _read(videos)
  assert (time.process_time() - start) * 10 < 8


def test_places():
  """The middle and the size that the world gives; mirrored with the clip."""
  for colour, size in (("red", "small"), ("blue", "large")):
    scene = world.Scene(colour, "circle", size, "still", "paper")
    video = world.render(scene, 3)
    found, mirrored = scorer.place(video), scorer.place(video[:, ::-1, ::-1])
    width = 1 / video.shape[1]
    radius = world.SIZES[size] * video.shape[1]
    wanted = np.log(radius) + np.log(np.pi) / 2
    assert found.size == pytest.approx(wanted, abs=0.05)
    for a, b in zip(found[:2], mirrored[:2], strict=True):
      assert a + b == pytest.approx(1 - width, abs=0.01)
  moving = world.render(scene._replace(motion="right"), 3)
  early, late = scorer.place(moving[:8]), scorer.place(moving[8:])
  assert late.right - early.right == pytest.approx(8 * world.SPEED, abs=0.01)
  assert scorer.place(np.zeros((8, 64, 64, 3), np.uint8)) is None


def test_spread_by_hand():
  """Deviations within prompts; what differs between prompts does not count."""
  places = [scorer.Place(0.2, 0.5, 3.0), scorer.Place(0.4, 0.5, 3.2)]
  apart = [scorer.Place(0.9, 0.1, 1.0)] * 2
  found = scorer.spread([[*places, None], apart, [places[0]], []])
  assert found["position"] == pytest.approx(np.sqrt(0.02 / 2))
  assert found["size"] == pytest.approx(np.sqrt(0.02 / 2))
  assert np.isnan(scorer.spread([places[:1]])["size"])
