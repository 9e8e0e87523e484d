"""Starts streams: videos of any length, made and decoded chunk by chunk."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dcvideogen_jax import errors
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.sample import arguments, chunkwise, denoise
from dcvideogen_jax.sample import options as options_lib

# One prompt, or prompts by the chunk from which they hold:
# {0: "a cat sits", 3: "it jumps"}.
Prompts = arguments.Prompt | Mapping[int, arguments.Prompt]


Stream = chunkwise.Stream


def start(pipeline: Any, prompt: Prompts, **options: Any) -> Stream:
  """Prepares a stream; the model runs when the stream is iterated.

  Args:
    pipeline: `pipeline.DCVideoGen`, with DC-AE-V.
    prompt: one for the whole video, or {number of a chunk: prompt from this
      chunk on}, including chunk 0. The KV cache of earlier chunks is not
      recomputed for a new prompt.
    **options: of `options.StreamOptions`; `frames` is required.

  Raises:
    errors.UserError: for arguments or frames that do not fit.
  """
  asked = options_lib.StreamOptions(**options)
  space, transformer = pipeline.parts.space, pipeline.parts.transformer
  if not isinstance(space, spaces.DCAEVLatents):
    raise errors.UserError("streams are made with DC-AE-V, not Wan's own")
  module = _in_chunks(transformer.module, asked.chunk)
  per_chunk = frames_of_chunk(pipeline, asked.chunk)
  _check_chunk(space, per_chunk)
  check(asked.window, asked.sink, asked.clean_level)
  texts = _texts(prompt)
  b = arguments.prompts(texts[0])[1]
  given = None if asked.given is None else np.asarray(asked.given)
  _check_given(given, per_chunk)
  first = _first(pipeline.task, arguments.image(asked.image, "image"), given)
  size = _size(pipeline, asked, first, given)
  count = -(-size.frames // per_chunk)
  if late := [n for n in texts if n >= count]:
    raise errors.UserError(
      f"there is no chunk {late[0]} to change the prompt at: {count} are made, "
      "the first is 0"
    )
  shape = pipeline.latent_shape(size._replace(frames=per_chunk))
  how = denoise.prepare(pipeline, asked, module, (b, *shape))
  seeds = arguments.seeds(asked.seed, b)
  with asked.phase("text"):
    embedded = {n: pipeline.embed(text, b) for n, text in texts.items()}
    negative = pipeline.embed(how.negative, b) if how.guided else None
  known = 0 if given is None else len(given)
  size = size._replace(frames=known + size.frames)
  settings = pipeline.settings(size, shape, how, seeds) | {
    "prompts": {n: arguments.shown(text) for n, text in texts.items()},
    "samples": b,
    "given_frames": known,
    "chunk": module.chunk,
    "window": asked.window,
    "sink": asked.sink,
    "clean_level": asked.clean_level,
  }
  return Stream(
    size=size,
    settings=settings,
    pipeline=pipeline,
    transformer=transformer._replace(module=module),
    asked=asked,
    how=how,
    shape=shape,
    counts=(known // per_chunk, count),
    given=given,
    first=first,
    texts=embedded,
    negative=negative,
    seeds=seeds,
  )


def _size(pipeline, asked, first, given):
  """Returns the size of the new frames, by default that of the given ones."""
  height, width = asked.height, asked.width
  if given is not None and height is None and width is None:
    height, width = given.shape[1:3]
  size = pipeline.size(asked.frames, height, width, asked.area, first)
  if given is not None and given.shape[1:3] != size[1:]:
    raise errors.UserError(
      f"the video to go on from is {given.shape[1]}x{given.shape[2]}, expected "
      f"{size.height}x{size.width}"
    )
  return size


def frames_of_chunk(pipeline: Any, chunk: int | None = None) -> int:
  """Returns how many video frames a chunk has.

  Args:
    pipeline: as for `start`.
    chunk: latent frames; None is the transformer's own number.

  Raises:
    errors.UserError: if `chunk` is not positive, or None for a transformer that
      was trained on whole clips.
  """
  module = _in_chunks(pipeline.parts.transformer.module, chunk)
  return module.chunk * module.patch[0] * pipeline.parts.space.temporal


def check(window: Any, sink: Any, clean_level: Any) -> None:
  """Checks options of a stream.

  Args:
    window, sink, clean_level: as in `options.StreamOptions`.

  Raises:
    errors.UserError: names the option that does not fit.
  """
  if window is not None and not _is_count(window, 1):
    raise errors.UserError(f"the window has 1 chunk or more, found {window!r}")
  if not _is_count(sink, 0):
    raise errors.UserError(f"the sink has 0 chunks or more, found {sink!r}")
  if sink and window is None:
    raise errors.UserError(
      "without a window every chunk is seen: a sink belongs to a window"
    )
  wrong = isinstance(clean_level, bool)
  wrong = wrong or not isinstance(clean_level, int | float)
  if wrong or not 0 <= clean_level < 1:
    raise errors.UserError(
      f"clean_level, a noise level, must be from 0 up to 1, found "
      f"{clean_level!r}"
    )


def _is_count(given: Any, least: int) -> bool:
  """Returns whether `given` is a whole number, at least `least`."""
  whole = isinstance(given, int) and not isinstance(given, bool)
  return whole and given >= least


def _in_chunks(module, chunk):
  """Returns the transformer with the given chunk, or with its own."""
  chunk = module.chunk if chunk is None else chunk
  if chunk is None:
    raise errors.UserError(
      "this transformer was trained on whole clips: give a chunk of latent "
      "frames to stream with it all the same"
    )
  if not _is_count(chunk, 1):
    raise errors.UserError(
      f"a chunk has 1 latent frame or more, found {chunk!r}"
    )
  return module.clone(chunk=chunk)


def _check_chunk(space, per_chunk):
  """Refuses chunks that cut those of DC-AE-V, which sees both ways in them."""
  frames = space.module.frames_multiple
  if per_chunk % frames:
    raise errors.UserError(
      f"a chunk is made of whole chunks of the autoencoder, multiples of "
      f"{frames // space.temporal} latent frames, found "
      f"{per_chunk // space.temporal}"
    )


def _texts(prompt: Prompts) -> dict[int, arguments.Prompt]:
  """Returns the prompts by the chunk from which they hold, in order."""
  given = prompt if isinstance(prompt, Mapping) else {0: prompt}
  if not all(_is_count(n, 0) for n in given) or 0 not in given:
    raise errors.UserError(
      f"expected prompts by the number of a chunk, with 0, found {[*given]}"
    )
  return {n: given[n] for n in sorted(given)}


def _check_given(given, per_chunk):
  if given is None:
    return
  if given.dtype != np.uint8 or given.ndim != 4 or given.shape[-1] != 3:
    raise errors.UserError(
      f"a video to go on from is uint8 (t, h, w, 3), found {given.dtype} "
      f"{given.shape}"
    )
  surplus = len(given) % per_chunk
  if not len(given) or surplus:
    raise errors.UserError(
      f"a video to go on from has whole chunks of {per_chunk} frames, found "
      f"{len(given)} frames"
      + (f": leave out the first {surplus}" if len(given) > surplus else "")
    )


def _first(task, image, given):
  """Checks and returns the first frame; None for text to video."""
  if given is not None and image is not None:
    raise errors.UserError("give an image or a video to go on from, not both")
  if task == "i2v" and given is not None:
    return given[0]
  arguments.images(task, image, None, None)
  return image
