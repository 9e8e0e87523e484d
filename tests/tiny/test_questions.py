"""Fixed prompts that no training sees."""

import collections
import hashlib

import numpy as np
import pytest

from dcvideogen_jax import errors
from dcvideogen_jax.tiny import scorer, world


def test_always_the_same_ones():
  """A change of these prompts makes all scores incomparable."""
  prompts = "\n".join(q.prompt for q in scorer.questions(400))
  digest = hashlib.sha256(prompts.encode()).hexdigest()
  assert digest[:16] == "98b67c23e17c41b8"
  assert scorer.questions(7) == scorer.questions(400)[:7]


def test_every_scene_once_and_of_no_training():
  scenes = [q.scene for q in scorer.questions(world.HELD_OUT)]
  assert sorted(scenes) == sorted(world.scenes("heldout"))
  assert not set(scenes) & set(world.scenes("train"))


def test_few_questions_cover_the_tables():
  scenes = [q.scene for q in scorer.questions(100)]
  tables = (world.COLOURS, world.SHAPES, world.SIZES, world.MOTIONS)
  for names, table in zip(zip(*scenes, strict=True), tables, strict=False):
    counts = collections.Counter(names)
    assert counts.keys() == {*table}
    assert min(counts.values()) > 100 / len(table) / 3


def test_more_questions_than_scenes_differ():
  questions = scorer.questions(2 * world.HELD_OUT)
  one, other = questions[0], questions[world.HELD_OUT]
  assert one.scene == other.scene
  assert one.prompt != other.prompt and one.seed != other.seed
  with pytest.raises(errors.UserError, match="at least one prompt, found 0"):
    scorer.questions(0)


def test_first_frames_are_of_the_scene():
  for question in scorer.questions(8):
    image = question.image(64, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    reading = scorer.read(image[None])
    assert reading.colour == question.scene.colour
    assert reading.shape == question.scene.shape
