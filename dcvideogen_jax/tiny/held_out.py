"""Prompts of `data.world` that no training has seen, always the same ones."""

import functools
import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.tiny import world


class Question(NamedTuple):
  """One video to ask for.

  Attributes:
    scene: what it shall show.
    prompt: the scene in words.
    seed: of the noise, and of the first frame.
  """

  scene: world.Scene
  prompt: str
  seed: int

  def image(self, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A first frame of the scene, for image to video."""
    return world.render(self.scene, self.seed, 1, height, width)[0]


@functools.cache
def questions(count: int) -> tuple[Question, ...]:
  """The first `count` held-out scenes in a fixed random order.

  All ways to put a scene into words take turns; more questions than scenes ask
  for a scene again, in other words and with another seed.

  Raises:
    errors.UserError: if the count is not positive.
  """
  if count < 1:
    raise errors.UserError(f"expected at least one prompt, found {count}")
  scenes = sorted(world.scenes("heldout"), key=_random)
  found = []
  for i in range(count):
    turn, at = divmod(i, len(scenes))
    words = world.caption(scenes[at], (i + turn) % len(world.TEMPLATES))
    found.append(Question(scenes[at], words, i))
  return tuple(found)


def _random(scene: world.Scene) -> bytes:
  """Sorts scenes in an order that no library's next version changes."""
  return hashlib.sha256(" ".join(("ask", *scene)).encode()).digest()
