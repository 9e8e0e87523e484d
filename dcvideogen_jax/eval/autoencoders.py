"""Functions that encode and decode clips: DC-AE-V and Wan's autoencoder."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dcvideogen_jax import errors, levels
from dcvideogen_jax.eval import official_clips
from dcvideogen_jax.models import streaming, wan_vae

# Frames of a clip, and the same frames of its reconstruction.
Pair = tuple[np.ndarray, np.ndarray]


def whole(
  module: nn.Module,
  variables: Any,
  rounding: str,
  decoder: nn.Module | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from a clip to its reconstruction, both uint8.

  The clip is encoded and decoded whole, in the module's own dtype. Wan's
  autoencoder takes 1 + 4k frames: the last frame is repeated until they are as
  many, and its copies are cut off again.

  Args:
    module: `dc_ae_v.DCAEV` or `wan_vae.WanVAE`.
    variables: its parameters.
    rounding: of `official_clips.to_levels`.
    decoder: decodes instead of `module`; its parameters are in `variables`.
  """
  decoder = decoder or module
  wan = isinstance(module, wan_vae.WanVAE)

  @functools.partial(jax.jit, static_argnums=1)
  def run(video, frames):
    latents = module.apply(variables, levels.to_float(video), method="encode")
    latents = latents.mean if wan else latents
    return decoder.apply(variables, latents, method="decode")[:, :frames]

  def reconstruct(video: np.ndarray) -> np.ndarray:
    frames, height, width = video.shape[:3]
    padded = np.concatenate([video, *_missing(module, video[-1], frames)])
    output = np.asarray(run(padded[None], frames))[0, :, :height, :width]
    return _to_levels(output, rounding)

  return reconstruct


def in_pieces(
  module: nn.Module,
  variables: Any,
  rounding: str,
  decoder: nn.Module | None = None,
) -> Callable[[Iterable[np.ndarray]], Iterator[Pair]]:
  """Returns a function that reconstructs a clip of any length in little memory.

  It takes the clip's frames in pieces, uint8 `t h w 3`, and yields pieces of
  the clip and of its reconstruction. They are those of `whole`, up to float
  rounding.

  Args:
    module, variables, rounding, decoder: as for `whole`.

  Raises:
    errors.UserError: if the module is not causal in time.
  """
  if getattr(module, "time", None) == "non_causal":
    raise errors.UserError(
      "a non-causal autoencoder sees a clip as a whole: expected a causal or"
      " chunk-causal one for --streamed"
    )
  run = _wan if isinstance(module, wan_vae.WanVAE) else _dc_ae_v

  def reconstruct(clip: Iterable[np.ndarray]) -> Iterator[Pair]:
    waiting: collections.deque[np.ndarray] = collections.deque()

    def video():
      count = 0
      for piece in clip:
        waiting.extend(piece)
        count += len(piece)
        yield piece[None]
      for copies in _missing(module, piece[-1], count):
        yield copies[None]

    for chunk in run(module, decoder or module, variables, video()):
      count = min(len(waiting), chunk.shape[1])
      if not count:
        continue
      truth = np.stack([waiting.popleft() for _ in range(count)])
      height, width = truth.shape[1:3]
      output = np.asarray(chunk)[0, :count, :height, :width]
      yield truth, _to_levels(output, rounding)

  return reconstruct


def _dc_ae_v(module, decoder, variables, video):
  latents = streaming.encode(module, variables, video)
  yield from streaming.decode(decoder, variables, latents)


def _wan(module, decoder, variables, video):
  posteriors = wan_vae.stream_encode(module, variables, video)
  means = (posterior.mean for posterior in posteriors)
  yield from wan_vae.stream_decode(decoder, variables, means)


def _missing(module, last: np.ndarray, frames: int) -> list[np.ndarray]:
  """Returns the copies of the last frame that Wan's autoencoder needs."""
  if not isinstance(module, wan_vae.WanVAE):
    return []
  count = -(frames - 1) % module.temporal_factor
  return [np.repeat(last[None], count, axis=0)] if count else []


def _to_levels(output: np.ndarray, rounding: str) -> np.ndarray:
  if rounding == "float32":
    return levels.to_uint8(output)
  return official_clips.to_levels(output.astype(np.float32), rounding)
