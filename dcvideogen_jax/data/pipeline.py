"""Endless, shuffled batches for training that resume exactly, on Grain.

Every random choice depends only on the number of its element, so that order and
content of the batches are the same for any number of threads. A batch is a
dictionary of arrays with a leading axis. Its keys depend on the "source" of the
data config:

  records, videos, synthetic, world, mix; see `random_clips.elements`:
    video   uint8 (b, frames, height, width, 3); (n, 1, height, width, 3) in
            the batches that are images, see `image_batches.mixed`
  captioned_videos; see `captioned.sources`:
    video   uint8 (b, frames, h, w, 3), in the size of a bucket
    ids     int32 (b, text_tokens), the token ids of a caption
    mask    int32 (b, text_tokens), 1 for tokens of the text, 0 for padding
    pixels  float32 (b, image_size, image_size, 3), the first frame prepared for
            CLIP, if the config has an image_size
  latents; see `latents.sources`; all float32, as far as the folder has them:
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
  image_batches,
  latents,
  options,
  random_clips,
  skipping,
)

# Sources that autoencoders are trained on; `CAPTIONED` is for transformers.
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
  """Returns an endless iterator over batches.

  With `get_state()` and `set_state(state)` the iterator resumes at exactly the
  next batch, with any number of threads. Call `close()` at the end. A batch of
  a `CAPTIONED` source comes from one bucket. All processes take the same bucket
  at the same step, and buckets alternate in proportion to their clips.

  Videos that cannot be used are left out with a warning. A clip that turns out
  to be damaged later is replaced by a clip of another video, the same one in
  every run. A warning names the damaged video at once, and closing the iterator
  lists all of them.

  Args:
    config: data config, with "source" and the keys of that source.
    batch_size: clips per batch of this process.
    seed: seed of the order, of augmentation and of the choice of captions.
    shard_index: number of this process; processes read disjoint clips.
    shard_count: number of processes.
    num_threads: number of reading threads; 0 reads in the calling thread.
    sources: sources that the caller supports.

  Raises:
    errors.UserError: for a bad config, a number that is out of range or a
      folder that cannot be used; while iterating, if a record or a hundred
      videos in succession are damaged.
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
    bucketed = _BUCKETED[source](config, process, skipped)
    dataset = buckets.mixed(bucketed, process, batch_size)
    iterator = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads, max(2, num_threads))
    )
  elif config.get("images"):
    clips = random_clips.elements(config, process, skipped)
    dataset = image_batches.mixed(clips, config, process, batch_size)
    iterator = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads, max(2, num_threads))
    )
  else:
    dataset = random_clips.elements(config, process, skipped)
    iterator = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads, 2 * batch_size)
    ).batch(batch_size, drop_remainder=True)
  return skipping.Telling(iter(iterator), skipped)
