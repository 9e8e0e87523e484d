"""Videos and their captions, for training straight from files."""

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
  """The clips of a folder by their size, with their captions.

  All files are looked at first; those that cannot be used are left out with a
  warning: without a caption, too short or damaged. Another clip of the same
  size takes the place of one that turns out to be damaged. Which caption a clip
  comes with is drawn in proportion to the tenth power of their scores.

  Args:
    config: keys
      source: "captioned_videos".
      path: a folder of videos.
      captions: a table as `tables.read` takes it; None is the .txt files
        beside the videos.
      tokenizer: a directory with a tokenizer.json.
      frames: of a clip, the first of the video.
      fps: frames per second of the clips, taken by their times; 16. None takes
        a file's frames as they come, as the official training does.
      bucket: a name as `buckets.find` takes it; or
      height, width: of all clips.
      factor: pixels of a latent's side, which sizes are multiples of; 32.
      text_tokens: tokens of a row; 512.
      image_size: of what CLIP sees of the first frame; None for nothing.
      stretch: shows CLIP the whole first frame, as `clip_images.preprocess`
        says, and not the middle of what was cut out; False.
    process: that reads; the first one warns of captions that are cut.
    skipped: is told of clips that turn out to be damaged.

  Raises:
    errors.UserError: for a bad config, if no video can be used, and from an
      element if a hundred videos one after another are damaged.
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
  """Numbers of the clips that can be trained on, by bucket."""
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
  """Warns of captions that are longer than what is read of them."""
  # A token stands for a byte or more: most need not be counted.
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
  """The place of a clip among those of its size as arrays, with one caption."""

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
