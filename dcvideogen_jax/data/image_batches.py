"""Batches of images among batches of clips, for training autoencoders."""

import math
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import options


def mixed(
  clips: grain.MapDataset,
  config: Mapping[str, Any],
  process: options.Process,
  batch_size: int,
) -> grain.MapDataset:
  """Makes a share of the batches images: clips of one frame.

  The same batches are images in every process. The images are different frames
  of the clips that the batch would have had, drawn at random.

  Args:
    clips: endless elements {"video": uint8 (t, h, w, 3)}.
    config: "images", the share of the batches, from 0 up to 1; "frames" of a
      clip; and "image_frames", the images that each clip gives, 1 if missing.
      With 1 image for as many frames as the autoencoder makes of one, a batch
      of images is as large as one of clips.
    process: the process that reads.
    batch_size: clips in a batch of this process.

  Raises:
    errors.UserError: if the clips have fewer frames than they should give.
  """
  share, count = config["images"], config.get("image_frames", 1)
  if not 0 <= share < 1 or not 1 <= count <= config["frames"]:
    raise errors.UserError(
      "images of the data config must be a share from 0 up to 1, and "
      f"image_frames from 1 to the {config['frames']} frames of a clip, found "
      f"{share} and {count}"
    )

  def batch(number, element):
    before, after = (math.floor(n * share) for n in (number, number + 1))
    if before == after:
      return element
    seed = (process.seed, process.index, int(number))
    rng = np.random.default_rng(seed)
    video = np.concatenate(
      [clip[rng.permutation(len(clip))[:count]] for clip in element["video"]]
    )
    return {"video": video[:, None]}

  return clips.batch(batch_size, drop_remainder=True).map_with_index(batch)
