"""What is asked of `pipeline.DCVideoGen`, with defaults."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float, UInt8

from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.sample import arguments, sizes


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
  """Says nothing about what is being done."""
  del name
  return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What videos and streams have in common.

  Attributes:
    negative_prompt: one for all, or one per prompt; None is Wan's own.
    image: first frame, uint8, for image to video; stretched to the video.
    height, width: pixels; None is 480 x 832, with an image `area` pixels in its
      shape.
    area: see `height`.
    steps: of the solver.
    guidance_scale: 1 is no guidance, and half the work.
    batched: whether both branches of the guidance go through the model at once;
      None does so where they are small.
    shift: of the noise levels; None is the checkpoint's.
    options: solver and grid; None is the checkpoint's.
    seed: one per prompt, or one for all. A sample's noise depends on its own
      seed only.
    memory_budget: bytes for encoding and decoding with DC-AE-V; None is most of
      what is free.
    phase: called with "text", "condition", "compile", "denoise", "decode";
      gives a context for it.
    on_step: called after each step with its number from 0, of a stream over all
      chunks, and the latents, which are only valid until it returns.
  """

  negative_prompt: arguments.Prompt | None = None
  image: arguments.Image | None = None
  height: int | None = None
  width: int | None = None
  area: int = sizes.AREA
  steps: int = 50
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
  """Of `DCVideoGen.generate`; see `Options` for the others.

  Attributes:
    frames: of the video.
    last_image: last frame. DC-VideoGen's released model was not trained for it.
    condition: instead of the images, as of `DCVideoGen.condition`.
    noise: standard normal, instead of the seeds'.
    size_rule: "exact", or "official", which rounds down as the reference (720
      rows become 704, 81 frames 80).
    condition_tail: how DC-AE-V encodes images where the video's frames do not
      fill its last chunk: "pad" repeats the last frame; "official" is the
      reference's, which forgets the chunks before and pads with zeros. None is
      "official" with that size rule, else "pad".
    one_program: run all steps as one program, without `on_step`.
  """

  frames: int = 80
  last_image: arguments.Image | None = None
  condition: Mapping[str, Array] | None = None
  noise: Float[Any, "b t h w c"] | None = None
  size_rule: str = "exact"
  condition_tail: str | None = None
  one_program: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions(Options):
  """Of `DCVideoGen.generate_stream`; see `Options` for the others.

  Attributes:
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
    given: frames to go on from, whole chunks of them, whose first is that of
      image to video, too. They come first in the video, as the autoencoder
      reconstructs them, so that there is no seam. Without `height` and `width`
      the size is theirs.
  """

  frames: int
  window: int | None = None
  sink: int = 0
  chunk: int | None = None
  clean_level: float = 0.0
  given: UInt8[Any, "t h w 3"] | None = None
