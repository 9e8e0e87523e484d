"""Clips whose values tell where they were cut, and batches of them."""

import itertools

import numpy as np

from dcvideogen_jax.data import pipeline

SIZE = {"frames": 4, "height": 16, "width": 24}


def numbered(count, frames=7, height=20, width=32):
  """Yields clips whose channels are 16 * clip + frame, row and column."""
  t, y, x = np.mgrid[:frames, :height, :width]
  for i in range(count):
    yield np.stack([16 * i + t, y, x], -1).astype(np.uint8)


def take(config, count, seed=0, batch_size=3, **options):
  """Returns the videos of the first batches."""
  iterator = pipeline.batches(
    config, batch_size=batch_size, seed=seed, **options
  )
  try:
    return [b["video"] for b in itertools.islice(iterator, count)]
  finally:
    iterator.close()
