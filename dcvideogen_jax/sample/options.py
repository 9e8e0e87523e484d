"""Options of `pipeline.DCVideoGen`, with their defaults."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.sample import arguments, sizes

# Number of the solver's steps, as in Wan's own pipelines.
STEPS = 50


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
  """Returns an empty context; the default of `Options.phase`."""
  del name
  return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The options that videos and streams share.

  Attributes:
    negative_prompt: one for all prompts, or one per prompt; None is Wan's own.
    image: first frame for image to video; it is stretched to the video's size.
    height, width: of the video, in pixels. If both are None, the video has the
      image's shape and `area` pixels, or 480 x 832 pixels without an image.
    area: see `height`.
    steps: number of the solver's steps; None is 50, or that of explicit levels.
    guidance_scale: 1 means no guidance, and half the work.
    batched: whether both branches of the guidance share one batch. None decides
      by the number of tokens.
    shift: of the noise levels; None is the checkpoint's.
    options: solver and grid of noise levels; None is the checkpoint's.
    seed: one per prompt, or one for all. A sample's noise depends on its own
      seed only.
    memory_budget: bytes for encoding and decoding with DC-AE-V; None is most of
      the free memory.
    phase: called with "text", "condition", "compile", "denoise" or "decode";
      returns a context in which that phase runs.
    on_step: called after each step with the step's number, from 0, and the
      latents, which are valid only until it returns. A stream numbers the steps
      of all chunks in sequence.
  """

  negative_prompt: arguments.Prompt | None = None
  image: arguments.Image | None = None
  height: int | None = None
  width: int | None = None
  area: int = sizes.AREA
  steps: int | None = None
  guidance_scale: float = 5.0
  batched: bool | None = None
  shift: float | None = None
  options: flow.Options | None = None
  seed: int | Sequence[int] = 0
  memory_budget: float | None = None
  phase: Callable[..., contextlib.AbstractContextManager[Any]] = no_phase
  on_step: Callable[[int, Array], None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOptions(Options):
  """The options of `DCVideoGen.generate`; see `Options` for the others.

  Attributes:
    frames: number of the video's frames.
    last_image: last frame. DC-VideoGen's released model was not trained for it.
    condition: replaces the images; as `DCVideoGen.condition` returns it.
    noise: standard normal; replaces the noise of the seeds.
    size_rule: "exact", or "official", which rounds down as the official code
      does (720 rows become 704, 81 frames 80).
    condition_tail: how DC-AE-V encodes images where the video's frames do not
      fill its last chunk. "pad" repeats the last frame. "official" forgets the
      chunks before and pads with zeros, as the official code does. None is
      "official" under that size rule, otherwise "pad".
    one_program: whether all steps run as one program, which cannot call
      `on_step`.
  """

  frames: int = 80
  last_image: arguments.Image | None = None
  condition: Mapping[str, Array] | None = None
  noise: Float[Any, "b t h w c"] | None = None
  size_rule: str = "exact"
  condition_tail: str | None = None
  one_program: bool = False

  def __post_init__(self):
    """Refuses options that exclude each other.

    Raises:
      errors.UserError: for `on_step` with `one_program`.
    """
    if self.one_program and self.on_step is not None:
      raise errors.UserError(
        "one_program runs all steps at once: it cannot call on_step"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions(Options):
  """The options of `DCVideoGen.generate_stream`; see `Options` for the others.

  Attributes:
    frames: number of new frames. Whole chunks are made, and the surplus is cut
      off.
    window: number of chunks before the current one that it attends to. None is
      all of them: the KV cache then grows with the video, and each chunk needs
      a program of its own.
    sink: number of chunks at the very beginning that every chunk also attends
      to.
    chunk: latent frames of a chunk, a multiple of those in the autoencoder's
      chunk. None is the chunk that the transformer was trained with. A
      transformer without one was trained on whole clips: any chunk makes its
      videos worse.
    clean_level: noise level of finished chunks when they are attended to; it
      should be that of the clean copies in training.
    given: frames that the stream continues, in whole chunks. They come first in
      the video, as the autoencoder reconstructs them, so that the video has no
      seam. For image to video their first frame is the image. If `height` and
      `width` are None, the video has their size.
  """

  frames: int
  window: int | None = None
  sink: int = 0
  chunk: int | None = None
  clean_level: float = 0.0
  given: UInt8[Any, "t h w 3"] | None = None
