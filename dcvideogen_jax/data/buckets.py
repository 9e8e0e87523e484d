"""Aspect buckets: a small set of sizes to which clips of any shape are resized.

The sizes are those of DC-VideoGen's training (dc-ai-projects/DC-Gen at commit
562077c). Deviation: a clip goes to the bucket with the nearest logarithm of
height over width. The official code compares with a table of rounded ratios.
"""

import functools
import math
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import options


class Size(NamedTuple):
  """Height and width of a video in pixels."""

  height: int
  width: int

  def __str__(self) -> str:
    return f"{self.height}x{self.width}"


def _sizes(text: str) -> tuple[Size, ...]:
  return tuple(Size(*map(int, size.split("x"))) for size in text.split())


# The sizes by the autoencoder's pixels per latent, then by name.
BUCKETS: dict[int, dict[str, tuple[Size, ...]]] = {
  32: {
    "480": _sizes(
      "448x896 480x832 512x768 544x704 640x640 672x608 704x544 768x512 "
      "832x480 896x448"
    ),
    "720": _sizes(
      "672x1344 704x1280 800x1152 832x1088 960x960 1024x896 1088x832 "
      "1152x800 1248x736 1280x736 1344x672"
    ),
    "1080": _sizes(
      "704x2880 928x2208 1088x1920 1280x1600 1408x1472 1440x1440 1472x1408 "
      "1600x1312 1856x1120 2240x928 2880x704"
    ),
    "2160": _sizes(
      "1440x5760 1856x4448 2176x3840 2592x3200 2784x2976 2880x2880 2976x2784 "
      "3200x2592 3712x2240 4448x1856 5760x1440"
    ),
  },
  64: {
    "480": _sizes(
      "448x896 448x832 512x768 576x704 640x640 640x576 704x576 768x512 "
      "832x512 832x448 896x448"
    ),
    "720": _sizes(
      "704x1344 704x1280 768x1152 832x1088 960x960 1024x896 1088x832 "
      "1152x768 1216x768 1280x704 1344x704"
    ),
  },
}


def find(name: str, factor: int = 32) -> tuple[Size, ...]:
  """Returns the sizes of a named bucket set, or parses a list of sizes.

  Args:
    name: a name in `BUCKETS` such as "480", or sizes written as HEIGHTxWIDTH,
      such as "64x64" or "64x96,96x64".
    factor: pixels per latent; height and width must be multiples of it.

  Raises:
    errors.UserError: for an unknown name, or a size that is not a multiple of
      `factor`.
  """
  known = BUCKETS.get(factor, {})
  if name in known:
    return known[name]
  own = name.split(",")
  if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in own):
    raise errors.UserError(
      f"there are no buckets {name!r} for latents of {factor} pixels: expected "
      f"{', '.join([*known, 'HEIGHTxWIDTH'])}"
    )
  sizes = _sizes(" ".join(own))
  for size in sizes:
    if size.height % factor or size.width % factor:
      raise errors.UserError(
        f"the size {size} is no multiple of {factor} pixels, as the "
        "autoencoder needs"
      )
  return sizes


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
  """Returns the size with the aspect ratio nearest to a video's.

  Of two sizes that are equally near, the first is taken.

  Args:
    height: height of the video.
    width: width of the video, in the same unit.
    sizes: the sizes to choose from.
  """
  ratio = math.log(height / width)
  return min(sizes, key=lambda s: abs(math.log(s.height / s.width) - ratio))


def fit(
  frame: UInt8[np.ndarray, "h w 3"], size: Size
) -> UInt8[np.ndarray, "{size.height} {size.width} 3"]:
  """Resizes a frame to cover the size, then crops the centre.

  Resizing is bilinear without antialiasing, as torch's interpolation in the
  official training, and rounds to whole levels.
  """
  if frame.shape[:2] == size:
    return frame
  scale = max(size.height / frame.shape[0], size.width / frame.shape[1])
  x = frame
  for axis, extent in enumerate(size):
    x = _resample(
      x, max(extent, round(frame.shape[axis] * scale)), extent, axis
    )
  return (x + np.float32(0.5)).astype(np.uint8)


def _resample(x, size: int, extent: int, axis: int):
  """Resamples an axis to `size` samples and returns the middle `extent`."""
  near, far, weight = _taps(x.shape[axis], size, extent)
  weight = weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
  first = np.take(x, near, axis).astype(np.float32)
  return first + weight * (np.take(x, far, axis) - first)


@functools.lru_cache(maxsize=64)
def _taps(length: int, size: int, extent: int):
  """Returns the two source indices of each sample and the second's weight."""
  place = np.arange(extent, dtype=np.float32) + (size - extent) // 2
  place = (place + np.float32(0.5)) * np.float32(length / size)
  place = np.maximum(place - np.float32(0.5), 0)
  near = np.minimum(place.astype(np.int64), length - 1)
  far = np.minimum(near + 1, length - 1)
  return near, far, place - near.astype(np.float32)


# --- batches of equal shapes -------------------------------------------------


class BucketSource(NamedTuple):
  """The clips of one bucket.

  Attributes:
    name: name of the bucket in messages.
    source: sequence of elements.
    transform: turns an element into arrays, with a random generator.
  """

  name: str
  source: Sequence
  transform: grain.transforms.RandomMap


def mixed(
  sources: Sequence[BucketSource], process: options.Process, batch_size: int
) -> grain.MapDataset:
  """Returns the endless batches of a process, each from one bucket.

  In each epoch of a bucket its clips are shuffled anew, and each clip comes
  once. Buckets alternate in proportion to their number of clips. A bucket with
  fewer clips than processes is left out with a warning.

  Args:
    sources: the buckets.
    process: the process that reads.
    batch_size: clips in a batch of this process.

  Raises:
    errors.UserError: if every bucket has fewer clips than there are processes.
  """
  datasets, counts = [], []
  for number, (name, source, transform) in enumerate(sources):
    if len(source) < process.count:
      warnings.warn(
        f"{name} has {len(source)} clips, fewer than {process.count} "
        "processes, and is left out",
        stacklevel=3,
      )
      continue
    dataset = grain.MapDataset.source(source).seed(process.grain_seed(number))
    dataset = dataset[process.shard].shuffle().repeat().random_map(transform)
    datasets.append(dataset.batch(batch_size, drop_remainder=True))
    counts.append(len(source))
  if not datasets:
    raise errors.UserError(
      f"there are too few clips for {process.count} processes: "
      + ", ".join(f"{name} has {len(source)}" for name, source, _ in sources)
    )
  return grain.MapDataset.mix(datasets, [n / math.fsum(counts) for n in counts])
