"""The result of sampling: latents that are decoded on demand."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.data import video as video_files
from dcvideogen_jax.sample import sizes

FPS = 16  # frames per second of Wan's and DC-VideoGen's videos


@dataclasses.dataclass(frozen=True)
class Generation:
  """Latents, and the function that decodes them.

  Attributes:
    latents: float32, scaled as the diffusion model returned them.
    size: of the video.
    settings: all settings of the run, ready for JSON.
  """

  latents: Float[Array, "b t h w c"]
  size: sizes.Size
  settings: Mapping[str, Any]
  _decode: Callable[[Array], Iterator[UInt8[np.ndarray, "b t h w 3"]]]

  def chunks(
    self, sample: int | None = None
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Decodes the video of all samples, or of one, piece by piece.

    The memory that this takes does not grow with the number of frames.

    Raises:
      errors.UserError: if there is no such sample.
    """
    if sample is None:
      return self._decode(self.latents)
    if not 0 <= sample < len(self.latents):
      raise errors.UserError(
        f"there are {len(self.latents)} samples, found number {sample}"
      )
    return self._decode(self.latents[sample : sample + 1])

  def watched(self, on_chunk: Callable[[np.ndarray], None]) -> "Generation":
    """Returns the same result, which shows each chunk to a function first.

    Args:
      on_chunk: called with each decoded chunk, uint8 (b, t, h, w, 3).
    """

    def decode(latents):
      for chunk in self._decode(latents):
        on_chunk(chunk)
        yield chunk

    return dataclasses.replace(self, _decode=decode)

  def video(self) -> UInt8[np.ndarray, "b t h w 3"]:
    """Decodes the whole video of all samples into host memory."""
    return np.concatenate(list(self.chunks()), axis=1)

  def save(
    self, path: str | os.PathLike[str], sample: int = 0, **options: Any
  ) -> None:
    """Writes one sample as an mp4, decoding as it goes.

    Args:
      path: ends in .mp4.
      sample: number of the sample, from 0.
      **options: of `data.video.VideoWriter`, such as `crf`.

    Raises:
      errors.UserError: if there is no such sample, or if the file cannot be
        written, in which case none is left behind.
    """
    save(self.chunks(sample), path, **options)


def save(
  chunks: Iterable[np.ndarray], path: str | os.PathLike[str], **options: Any
) -> None:
  """Writes the first sample of chunks `b t h w 3` as an mp4."""
  with video_files.VideoWriter(path, **{"fps": FPS, **options}) as writer:
    for chunk in chunks:
      writer.write(chunk[0])
