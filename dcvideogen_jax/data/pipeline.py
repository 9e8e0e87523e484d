"""Endless, shuffled, exactly resumable batches for training, on Grain.

Every random choice is made from the number of the element it is for, so order
and content are the same for any number of threads. Batches are dictionaries of
arrays with a leading axis, by the "source" of a data config:

  records, videos, synthetic, world, mix, see `random_clips.elements`:
    video   uint8 (b, frames, height, width, 3)
  captioned_videos, see `captioned.sources`:
    video   uint8 (b, frames, h, w, 3), of the size of a bucket
    ids     int32 (b, text_tokens), the tokens of a caption
    mask    int32 (b, text_tokens), 1 for tokens of the text
    pixels  float32 (b, image_size, image_size, 3), what CLIP sees of the first
            frame, with an image_size
  latents, see `latents.sources`; all float32, as far as the folder has them:
    base, deep, base_condition, deep_condition  (b, t, h, w, c)
    text    (b, text_tokens, e)
    image   (b, m, e)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain

from dcvideogen_jax import errors
from dcvideogen_jax.data import (
  buckets,
  captioned,
  latents,
  options,
  random_clips,
  skipping,
)

# What autoencoders are trained on, and what transformers are.
CLIPS = random_clips.SOURCES
_BUCKETED = {
  "latents": latents.sources,
  "captioned_videos": captioned.sources,
}
CAPTIONED = tuple(_BUCKETED)


def batches(
  config: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
  num_threads: int = 4,
  sources: Sequence[str] = (*CLIPS, *CAPTIONED),
) -> grain.DatasetIterator:
  """An endless iterator over batches.

  Its `get_state()` and `set_state(state)` continue at exactly the next batch,
  with any number of threads. Call `close()` when done. Batches of `CAPTIONED`
  sources are of one bucket each: all processes take the same bucket at the same
  step, and a bucket's turn comes in proportion to its clips.

  Videos that cannot be used are left out with a warning. A clip of another one
  takes the place of one that turns out to be damaged: the same one in every
  run, named at once and listed when the iterator is closed.

  Args:
    config: "source", and the other keys of its source.
    batch_size: clips per batch of this process.
    seed: of the order, of augmentation, and of which caption a clip comes with.
    shard_index: this process among `shard_count`; their clips are disjoint.
    shard_count: number of processes.
    num_threads: readers; 0 reads in the calling thread.
    sources: those that the caller can use.

  Raises:
    errors.UserError: for a bad config, a number that is out of range or a
      folder that cannot be used, and while iterating when a record turns out to
      be damaged, or a hundred videos one after another.
  """
  if batch_size <= 0:
    raise errors.UserError(f"batch_size must be positive, not {batch_size}")
  if not 0 <= shard_index < shard_count:
    raise errors.UserError(
      f"shard_index must be in [0, {shard_count}), not {shard_index}"
    )
  if seed < 0:
    raise errors.UserError(f"the data seed must not be negative: {seed}")
  source = config.get("source")
  if source and source not in sources:
    raise errors.UserError(
      f"the data source must be one of {tuple(sources)}, not {source!r}"
    )
  process = options.Process(seed, shard_index, shard_count)
  skipped = skipping.Skipped()
  if source in _BUCKETED:
    clips = _BUCKETED[source](config, process, skipped)
    dataset = buckets.mixed(clips, process, batch_size)
    iterator = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads, max(2, num_threads))
    )
  else:
    dataset = random_clips.elements(config, process, skipped)
    iterator = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads, 2 * batch_size)
    ).batch(batch_size, drop_remainder=True)
  return skipping.Telling(iter(iterator), skipped)
