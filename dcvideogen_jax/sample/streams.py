"""Video made chunk by chunk, as long as is asked for, decoded as it comes."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.diffusion import flow, guidance
from dcvideogen_jax.sample import (
  arguments,
  chunkwise,
  denoise,
  generation,
  latents,
  sizes,
)

# A text, or the text from each chunk on: {0: "a cat sits", 3: "it jumps"}.
Prompts = arguments.Prompt | Mapping[int, arguments.Prompt]


@dataclasses.dataclass(frozen=True)
class Stream:
  """A video that is made while one looks at it; each iteration makes it anew.

  Attributes:
    size: of the video, with the frames that were given.
    settings: what is done, ready for JSON.
  """

  size: sizes.Size
  settings: Mapping[str, Any]
  _latents: Callable[[], Iterator[chunkwise.Latents]]
  _decode: Callable[[Iterator[chunkwise.Latents]], Iterator[np.ndarray]]

  def latents(self) -> Iterator[chunkwise.Latents]:
    """Latents chunk by chunk, float32, those of given frames first.

    The last chunk is a whole one too.
    """
    return self._latents()

  def chunks(
    self, sample: int | None = None
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Decoded frames as they are made; of all samples, or of one.

    Raises:
      errors.UserError: if there is no such sample.
    """
    count = self.settings["samples"]
    if sample is not None and not 0 <= sample < count:
      raise errors.UserError(
        f"there are {count} samples, found number {sample}"
      )
    some = slice(None) if sample is None else slice(sample, sample + 1)
    for chunk in self._decode(self._latents()):
      yield chunk[some]

  def __iter__(self) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    return self.chunks()

  def save(
    self, path: str | os.PathLike[str], sample: int = 0, **options: Any
  ) -> None:
    """Writes one sample as an mp4; as `generation.Generation.save`."""
    options = {"fps": generation.FPS, **options}
    with video_files.VideoWriter(path, **options) as writer:
      for chunk in self.chunks(sample):
        writer.write(chunk[0])


def start(
  made: Any,
  prompt: Prompts,
  *,
  frames: int,
  window: int | None = None,
  sink: int = 0,
  chunk: int | None = None,
  clean_level: float = 0.0,
  given: UInt8[np.ndarray, "t h w 3"] | None = None,
  negative_prompt: arguments.Prompt | None = None,
  image: arguments.Image | None = None,
  height: int | None = None,
  width: int | None = None,
  area: int = sizes.AREA,
  steps: int = 50,
  guidance_scale: float = 5.0,
  batched: bool | None = None,
  shift: float | None = None,
  options: flow.Options | None = None,
  seed: int | Sequence[int] = 0,
  memory_budget: float | None = None,
  phase: Callable[..., Any] = denoise.no_phase,
  on_step: Callable[[int, Array], None] | None = None,
) -> Stream:
  """Prepares a stream; the model runs when it is iterated.

  Args:
    made: `pipeline.DCVideoGen`, with DC-AE-V. Other arguments than the
      following are as for its `generate`.
    prompt: for the whole video, or from each chunk on: {number: prompt} with
      the number 0. What earlier chunks left is not computed again for a new
      prompt.
    frames: to make. Whole chunks are made, and the surplus is cut off.
    window: chunks before the present one that it sees; None is all of them,
      whose keys and values then grow with the video, and so do the programs,
      as every chunk has its own.
    sink: chunks at the very beginning that are seen besides.
    chunk: latent frames of a chunk, a multiple of those of the autoencoder's;
      None is the transformer's own, which it was trained with. A transformer
      that has none was trained on whole clips: the video will be the worse for
      any chunk.
    clean_level: noise level at which finished chunks are looked at; that of
      the clean copies in training.
    given: frames to go on from, whole chunks of them, uint8. They come first in
      the video, as the autoencoder reconstructs them, so that there is no seam.
    image: first frame, for image to video; with `given`, the first of these.
    height, width: pixels; None is as for `generate`, or those of `given`.
    on_step: called after each step with its number from 0 over all chunks.

  Raises:
    errors.UserError: for arguments or frames that do not fit.
  """
  space, transformer = made.parts.space, made.parts.transformer
  if not isinstance(space, latents.Deep):
    raise errors.UserError("streams are made with DC-AE-V, not Wan's own")
  module = _in_chunks(transformer.module, chunk)
  per_chunk = frames_of_chunk(made, chunk)
  _check_chunk(space, per_chunk)
  check(window, sink, clean_level)
  texts = _texts(prompt)
  b = arguments.prompts(texts[0])[1]
  scale = arguments.guidance_scale(guidance_scale)
  guided = guidance.needed(scale)
  given = None if given is None else np.asarray(given)
  _check_given(given, per_chunk)
  first = _first(made.task, arguments.image(image, "image"), given)
  if given is not None and height is None and width is None:
    height, width = given.shape[1:3]
  size = made.size(frames, height, width, area, first)
  if given is not None and given.shape[1:3] != size[1:]:
    raise errors.UserError(
      f"the video to go on from is {given.shape[1]}x{given.shape[2]}, expected "
      f"{size.height}x{size.width}"
    )
  count = -(-size.frames // per_chunk)
  if late := [n for n in texts if n >= count]:
    raise errors.UserError(
      f"there is no chunk {late[0]} to change the prompt at: {count} are made, "
      "the first is 0"
    )
  shape = made.latent_shape(size._replace(frames=per_chunk))
  seeds = arguments.seeds(seed, b)
  options, plan = made.plan(options, shift, steps)
  if batched is None:
    batched = denoise.batched_by_default(module, (b, *shape), made.layout)
  if made.layout is not None:
    made.layout.check_batch(2 * b if batched and guided else b)
  negative = made.negative_prompt()
  negative = negative if negative_prompt is None else negative_prompt
  with phase("text"):
    embedded = {n: made.embed(text, b) for n, text in texts.items()}
    uncond = made.embed(negative, b) if guided else None
  known = 0 if given is None else len(given)
  run = chunkwise.Run(
    made=made,
    transformer=transformer._replace(module=module),
    shape=shape,
    size=size._replace(frames=known + size.frames),
    chunks=(known // per_chunk, count),
    given=given,
    first=first,
    texts=embedded,
    negative=uncond,
    seeds=seeds,
    plan=plan,
    scale=scale,
    batched=batched,
    keep=(sink, window),
    clean_level=clean_level,
    memory_budget=memory_budget,
    phase=phase,
    on_step=on_step,
  )
  settings = {
    "task": made.task,
    "prompts": {n: _shown(text) for n, text in texts.items()},
    "negative_prompt": None if uncond is None else _shown(negative),
    "samples": b,
    **run.size._asdict(),
    "given_frames": known,
    "chunk": module.chunk,
    "window": window,
    "sink": sink,
    "clean_level": clean_level,
    "latents": list(shape),
    "steps": steps,
    "guidance_scale": scale,
    "batched": batched,
    **options._asdict(),
    "seeds": seeds,
    "dtype": jnp.dtype(made.parts.dtype).name,
    "mesh": made.layout and dict(made.layout.mesh.shape),
    "files": dict(made.parts.files),
  }
  return Stream(run.size, settings, run.latents, run.decode)


def frames_of_chunk(made: Any, chunk: int | None = None) -> int:
  """Frames of the video in a chunk; arguments and errors as of `start`."""
  module = _in_chunks(made.parts.transformer.module, chunk)
  return module.chunk * module.patch[0] * made.parts.space.temporal


def check(window: Any, sink: Any, clean_level: Any) -> None:
  """Raises UserError unless they are what `start` takes."""
  if window is not None and (not isinstance(window, int) or window < 1):
    raise errors.UserError(f"the window has 1 chunk or more, found {window!r}")
  if not isinstance(sink, int) or sink < 0:
    raise errors.UserError(f"the sink has 0 chunks or more, found {sink!r}")
  if sink and window is None:
    raise errors.UserError(
      "without a window every chunk is seen: a sink belongs to a window"
    )
  if not isinstance(clean_level, int | float) or not 0 <= clean_level < 1:
    raise errors.UserError(
      f"clean_level, a noise level, must be from 0 up to 1, found "
      f"{clean_level!r}"
    )


def _in_chunks(module, chunk):
  """The transformer with the chunk that is asked for, or its own."""
  chunk = module.chunk if chunk is None else chunk
  if chunk is None:
    raise errors.UserError(
      "this transformer was trained on whole clips: give a chunk of latent "
      "frames to stream with it all the same"
    )
  if not isinstance(chunk, int) or chunk < 1:
    raise errors.UserError(
      f"a chunk has 1 latent frame or more, found {chunk!r}"
    )
  return module.clone(chunk=chunk)


def _check_chunk(space, per_chunk):
  """DC-AE-V sees both ways within its own chunks, which must not be cut."""
  frames = space.module.frames_multiple
  if per_chunk % frames:
    raise errors.UserError(
      f"a chunk is made of whole chunks of the autoencoder, multiples of "
      f"{frames // space.temporal} latent frames, found "
      f"{per_chunk // space.temporal}"
    )


def _shown(prompt: arguments.Prompt) -> str | list[str] | None:
  """Texts; None for embeddings."""
  if isinstance(prompt, str):
    return prompt
  return None if hasattr(prompt, "ndim") else list(prompt)


def _texts(prompt: Prompts) -> dict[int, arguments.Prompt]:
  """The prompt from each chunk on, in order."""
  given = prompt if isinstance(prompt, Mapping) else {0: prompt}
  if any(not isinstance(n, int) or n < 0 for n in given) or 0 not in given:
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
  """The first frame for image to video, checked; None for text to video."""
  if given is not None and image is not None:
    raise errors.UserError("give an image or a video to go on from, not both")
  if task == "i2v" and given is not None:
    return given[0]
  arguments.images(task, image, None, None)
  return image
