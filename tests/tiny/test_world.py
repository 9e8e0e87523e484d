"""The captioned world: splits, captions, motion, sizes, determinism."""

import hashlib
import importlib.resources
import itertools
import time

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.tiny import synthetic, world

TRAIN, HELD_OUT = (world.scenes(split) for split in world.SPLITS)
EVERY = TRAIN + HELD_OUT
TABLES = (
  world.COLOURS,
  world.SHAPES,
  world.SIZES,
  world.MOTIONS,
  world.BACKGROUNDS,
)


def _some(count, seed=0):
  picks = np.random.default_rng(seed).choice(len(EVERY), count, replace=False)
  return [EVERY[i] for i in picks]


def _mask(video, colour):
  """Returns the pixels nearer to the colour than to grey."""
  difference = video.astype(int) - world.COLOURS[colour]
  grey = video.astype(int) - video.mean(-1, keepdims=True)
  return np.abs(difference).sum(-1) < np.abs(grey).sum(-1)


def _middles(mask):
  """Returns row and column of the mask's middle, and its area, per frame."""
  y, x = np.mgrid[: mask.shape[1], : mask.shape[2]]
  area = mask.sum((1, 2))
  return (mask * y).sum((1, 2)) / area, (mask * x).sum((1, 2)) / area, area


def test_splits_share_nothing_and_lack_nothing():
  assert len(HELD_OUT) == world.HELD_OUT >= 300 and len(TRAIN) > 3000
  assert not set(TRAIN) & set(HELD_OUT)
  assert set(EVERY) == set(itertools.product(*TABLES))
  assert len(EVERY) == len(set(EVERY)) == 3920


def test_what_is_held_out_never_changes():
  """Published weights were trained on all other scenes."""
  names = " ".join("-".join(scene) for scene in HELD_OUT)
  digest = hashlib.sha256(names.encode()).hexdigest()
  assert digest[:16] == "905bf27376f65497"


@pytest.mark.parametrize("pair", list(itertools.combinations(range(5), 2)))
def test_every_pair_of_facts_is_trained_on(pair):
  one, other = pair
  seen = {(scene[one], scene[other]) for scene in TRAIN}
  assert seen == set(itertools.product(TABLES[one], TABLES[other]))
  assert {scene[one] for scene in HELD_OUT} == set(TABLES[one])


def test_captions_say_each_scene_in_other_words():
  captions = {
    world.caption(scene, variant)
    for scene in EVERY
    for variant in range(len(world.TEMPLATES))
  }
  assert len(captions) == len(EVERY) * len(world.TEMPLATES)
  scene = world.Scene("red", "circle", "small", "left", "paper")
  assert world.caption(scene) == "a small red circle moves left over paper"


def test_words_stand_for_one_fact():
  kinds = [
    set(" ".join(words).split())
    for words in (
      world.COLOURS,
      world.SHAPES,
      world.SIZES,
      [motion.phrase for motion in world.MOTIONS.values()],
      world.BACKGROUNDS,
    )
  ]
  for one, other in itertools.combinations(kinds, 2):
    assert not one & other


def test_captions_are_short_in_the_tiny_tokenizer():
  assets = importlib.resources.files("dcvideogen_jax") / "assets"
  tokenizer = tokenize.Tokenizer.from_directory(
    str(assets / "dcvideogen_tiny" / "tokenizer")
  )
  captions = [
    world.caption(scene, variant)
    for scene in EVERY[::7]
    for variant in range(len(world.TEMPLATES))
  ]
  ids, mask = tokenizer(captions, length=30)
  # Each word of a caption is one token; commas and the end are further ones.
  assert mask.sum(1).max() <= 13
  assert not ((ids == 3) & (mask == 1)).any()


@pytest.mark.parametrize("size", [(16, 64, 64), (13, 40, 72), (1, 32, 32)])
def test_clips_have_the_size_asked_for(size):
  for seed, scene in enumerate(_some(6)):
    video = world.render(scene, seed, *size)
    assert video.shape == (*size, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video, world.render(scene, seed, *size))
    assert (video != world.render(scene, seed + 1, *size)).any()


def test_the_first_frames_do_not_depend_on_the_last():
  for seed, scene in enumerate(_some(20, 1)):
    long = world.render(scene, seed, 40)
    np.testing.assert_array_equal(long[:13], world.render(scene, seed, 13))


def test_larger_pictures_show_the_same():
  for seed, scene in enumerate(_some(12, 2)):
    small = world.render(scene, seed, 4).astype(float)
    large = world.render(scene, seed, 4, 128, 128).astype(float)
    shrunk = large.reshape(4, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 2


@pytest.mark.parametrize(
  ("motion", "expected"),
  [
    ("left", (0, -1, 0)),
    ("right", (0, 1, 0)),
    ("up", (-1, 0, 0)),
    ("down", (1, 0, 0)),
    ("still", (0, 0, 0)),
    ("grows", (0, 0, 1)),
    ("shrinks", (0, 0, -1)),
  ],
)
def test_shapes_move_as_they_are_said_to(motion, expected):
  scenes = [s for s in _some(400, 3) if s.motion == motion][:24]
  assert len(scenes) == 24
  for seed, scene in enumerate(scenes):
    video = world.render(scene, seed, world.MOVING_FRAMES)
    rows, columns, area = _middles(_mask(video, scene.colour))
    # Pixels per frame, and per cent of the radius per frame: over the whole
    # clip and over every five frames.
    found = np.array([rows, columns, 50 * np.log(area)])
    whole = (found[:, -1] - found[:, 0]) / (world.MOVING_FRAMES - 1)
    assert (np.sign(np.round(whole)) == expected).all(), scene
    stretches = (found[:, 5:] - found[:, :-5]) * np.array(expected)[:, None]
    assert (stretches[np.nonzero(expected)] > 3).all(), scene


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112), (96, 64)])
def test_what_comes_to_rest_and_when(height, width):
  """No pixel changes after the first frame for which `later` says "still"."""
  for seed, scene in enumerate(_some(40, 5)):
    assert world.later(scene, 0, height, width) == scene
    first = 1
    while True:
      try:
        found = world.later(scene, first, height, width)
        break
      except errors.UserError:
        first += 1
    assert found == scene._replace(motion="still")
    assert first == 1 if scene.motion == "still" else first >= 16
    video = world.render(scene, seed, first + 8, height, width)
    assert (video[first:] == video[first]).all()


@pytest.mark.parametrize("frames", [16, 60])
def test_shapes_stay_in_the_picture(frames):
  for seed, scene in enumerate(_some(50, 4)):
    mask = _mask(world.render(scene, seed, frames), scene.colour)
    assert mask.any((1, 2)).all()
    # A triangle may touch the edge with its tip; a shape that is cut off would
    # touch it with more pixels.
    touching = mask[:, [0, -1]].sum(2).max(), mask[:, :, [0, -1]].sum(1).max()
    assert max(touching) <= 2, scene


@pytest.mark.parametrize("size", world.SIZES)
def test_sizes(size):
  circles = [s for s in EVERY if s.shape == "circle" and s.size == size]
  radii = []
  for seed, scene in enumerate(circles[::6]):
    video = world.render(scene, seed, 16, 64, 80)
    area = np.median(_middles(_mask(video, scene.colour))[2])
    radii.append(np.sqrt(area / np.pi) / 64)
  expected = world.SIZES[size]
  assert np.mean(radii) == pytest.approx(expected, rel=0.02)
  assert np.abs(np.array(radii) / expected - 1).max() < 0.03


def test_only_shapes_are_saturated():
  """Chroma separates shapes from backgrounds, and colours lie far apart."""
  for seed, scene in enumerate(_some(100, 5)):
    frame = world.render(scene, seed, 1)[0].astype(int)
    inside = _mask(frame[None], scene.colour)[0]
    chroma = np.ptp(frame, axis=-1)
    assert np.median(chroma[inside]) > 90
    # Edges are mixed with the shape's colour.
    assert np.quantile(chroma[~inside], 0.8) < 55
  colours = np.array(list(world.COLOURS.values()))
  apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
  assert apart[~np.eye(len(colours), dtype=bool)].min() > 100


def test_backgrounds_differ_and_rest():
  grounds = {}
  for name in world.BACKGROUNDS:
    scene = world.Scene("red", "cross", "small", "still", name)
    video = world.render(scene, 1)
    np.testing.assert_array_equal(video, video[:1].repeat(16, 0))
    grounds[name] = np.median(video[0], (0, 1))
  for one, other in itertools.combinations(grounds.values(), 2):
    assert np.abs(one - other).max() > 12


def test_edges_are_anti_aliased():
  scene = world.Scene("yellow", "circle", "large", "still", "ocean")
  video = world.render(scene, 3, 1)[0].astype(float)
  blue, yellow = video.min((0, 1))[0], video.max((0, 1))[0]
  part = (video[..., 0] - blue) / (yellow - blue)
  mixed = (part > 0.2) & (part < 0.8)
  radius = np.sqrt((part > 0.5).sum() / np.pi)
  assert radius < mixed.sum() < 8 * radius


@pytest.mark.parametrize("split", world.SPLITS)
def test_sequences_show_every_scene_once_an_epoch(split, monkeypatch):
  black = np.zeros((1, 1, 1, 3), np.uint8)
  monkeypatch.setattr(world, "_render", lambda *a: black)
  count = len(world.scenes(split))
  found = [world.clip(split, i)[0] for i in range(2 * count)]
  for part in (found[:count], found[count:]):
    assert sorted(part) == sorted(world.scenes(split))
  assert found[:count] != found[count:]
  other = [world.clip(split, i, 1)[0] for i in range(count)]
  assert other != found[:count]


def test_clips_of_a_sequence_are_reproducible_and_differ():
  clips = [world.clip("train", i, 5, 4, 32, 32) for i in range(30)]
  for i in (29, 3, 11):
    again = world.clip("train", i, 5, 4, 32, 32)
    assert again[:2] == clips[i][:2]
    np.testing.assert_array_equal(again[2], clips[i][2])
  assert len({video.tobytes() for *_, video in clips}) == 30
  for scene, words, _ in clips:
    variants = [world.caption(scene, v) for v in range(len(world.TEMPLATES))]
    assert words in variants
  used = {words.split()[1] for _, words, _ in clips}
  assert {"video", "in"} <= used and len(used) > 4


def test_shapes_are_those_of_synthetic_motion():
  assert set(world.SHAPES) <= set(synthetic.SHAPES)


def test_mistakes_are_told():
  with pytest.raises(errors.UserError, match="not 'test'"):
    world.scenes("test")
  with pytest.raises(errors.UserError, match="not 'test'"):
    world.clip("test", 0)
  with pytest.raises(errors.UserError, match="0 to 3, not 4"):
    world.caption(EVERY[0], 4)


def test_a_clip_costs_a_few_milliseconds():
  start = time.process_time()
  for i in range(20):
    world.clip("train", i)
  assert (time.process_time() - start) / 20 < 0.02
