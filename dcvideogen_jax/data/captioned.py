"""Reads videos and their captions, for training directly from video files."""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.data import (
  buckets,
  clip_sources,
  latents,
  skipping,
  timing,
  tokenize,
)
from dcvideogen_jax.data import options as options_lib

_REQUIRED = ("source", "path", "tokenizer", "frames")
_DEFAULTS = {
  "captions": None,
  "bucket": None,
  "height": None,
  "width": None,
  "factor": 32,
  "fps": timing.FPS,
  "text_tokens": tokenize.LENGTH,
  "image_size": None,
  "stretch": False,
}


def sources(
  config: Mapping[str, Any],
  process: options_lib.Process,
  skipped: skipping.Skipped,
) -> list[buckets.BucketSource]:
  """Returns the clips of a folder by bucket, with their captions.

  All files are probed first. Videos without a caption and videos that are too
  short or damaged are left out with a warning. A clip that turns out to be
  damaged later is replaced by another clip of the same size. A clip comes with
  one of its captions, drawn in proportion to the tenth power of its score.

  Args:
    config: keys
      source: "captioned_videos".
      path: a folder of videos.
      captions: a table as `tables.read` takes it; None reads the .txt files
        beside the videos.
      tokenizer: a directory with a tokenizer.json.
      frames: frames of a clip, from the beginning of the video.
      fps: frames per second of the clips, resampled by the frames' times; 16.
        None takes all frames of a file, as the official training does.
      bucket: a name as `buckets.find` takes it; or
      height, width: the size of all clips in pixels.
      factor: pixels per latent; height and width are multiples of it; 32.
      text_tokens: tokens of a caption, after padding or cutting; 512.
      image_size: height and width of the image for CLIP; None omits "pixels".
      stretch: whether CLIP sees the whole first frame of the file, stretched
        to a square, instead of the centre of the clip's first frame; False.
    process: the process that reads. Process 0 warns of captions that are cut.
    skipped: records the clips that turn out to be damaged.

  Raises:
    errors.UserError: for a bad config or if no video can be used; also when an
      element is read, if a hundred videos in succession are damaged.
  """
  options = options_lib.checked(
    config,
    ("captioned_videos",),
    _REQUIRED,
    _DEFAULTS,
    positive=("frames", "text_tokens"),
  )
  sides = [options["height"], options["width"]]
  if (options["bucket"] is None) == (None in sides):
    raise errors.UserError(
      "the data config needs either a bucket or height and width, found "
      f"{options['bucket']!r} and {sides}"
    )
  name = options["bucket"] or f"{sides[0]}x{sides[1]}"
  sizes = buckets.find(name, options["factor"])
  folder = clip_sources.Folder(
    options["path"], options["captions"], options["fps"]
  )
  tokenizer = tokenize.Tokenizer.from_directory(options["tokenizer"])
  usable = _usable(folder, options["frames"], sizes)
  if process.index == 0:
    _tell_cut(folder, usable, tokenizer, options["text_tokens"])
  return [
    buckets.BucketSource(
      f"{options['path']}, {size}",
      range(len(usable[size])),
      _Draw(folder, usable[size], size, tokenizer, options, skipped),
    )
    for size in sizes
    if size in usable
  ]


def _usable(
  folder: clip_sources.Folder, frames: int, sizes: Sequence[buckets.Size]
) -> dict[buckets.Size, list[int]]:
  """Returns the numbers of the clips that can be used, by bucket."""
  folder.look()
  usable, out = collections.defaultdict(list), []
  for i in range(len(folder)):
    try:
      if not folder[i].captions:
        raise errors.UserError("it has no caption")
      usable[folder.place(i, frames, sizes).size].append(i)
    except errors.UserError as e:
      out.append(f"{folder[i].file} ({e})")
  if not usable:
    raise errors.UserError(f"no video can be used: {out[0]}")
  if out:
    warnings.warn(
      f"{len(out)} of {len(folder)} videos are left out: "
      f"{skipping.listed(out)}",
      stacklevel=3,
    )
  return usable


def _tell_cut(
  folder: clip_sources.Folder,
  usable: Mapping[buckets.Size, list[int]],
  tokenizer: tokenize.Tokenizer,
  tokens: int,
) -> None:
  """Warns of captions that have more than `tokens` tokens."""
  # A token stands for at least one byte, so that short captions need not be
  # tokenised.
  texts = [
    text
    for numbers in usable.values()
    for number in numbers
    for text in folder[number].captions
    if len(text.encode()) + 2 > tokens
  ]
  if cut := int((tokenizer.count(texts) > tokens).sum()):
    warnings.warn(
      f"{cut} captions are cut to their first {tokens} tokens", stacklevel=3
    )


class _Draw(grain.transforms.RandomMap):
  """Reads the clip at a position of its bucket, with one of its captions."""

  def __init__(self, folder, numbers, size, tokenizer, options, skipped):
    self._folder, self._numbers, self._size = folder, numbers, size
    self._tokenizer, self._options = tokenizer, options
    self._skipped = skipped

  def random_map(self, element: int, rng: np.random.Generator):
    return skipping.first(
      skipping.candidates(self._numbers, int(element)),
      self._read,
      lambda number: self._folder[number].file,
      rng,
      self._skipped,
    )

  def _read(self, number: int, rng: np.random.Generator):
    options = self._options
    loaded = self._folder.load(number, options["frames"], [self._size])
    texts = loaded.meta["captions"]
    odds = latents.caption_weights(len(texts), loaded.meta["scores"])
    text = texts[rng.choice(len(texts), p=odds)]
    ids, mask = self._tokenizer([text], options["text_tokens"])
    arrays = {"video": loaded.video, "ids": ids[0], "mask": mask[0]}
    if options["image_size"] is not None:
      arrays["pixels"] = loaded.pixels(
        options["image_size"], options["stretch"]
      )
    return arrays
