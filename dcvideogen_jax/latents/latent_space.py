"""The interface of a latent space: its geometry, encoding and decoding."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.latents import videos

Variables = Mapping[str, Any]
Latents = Float[Array, "b tz hz wz c"]
Size = videos.Size
Decoded = Iterator[UInt8[np.ndarray, "b t h w 3"]]


class LatentSpace:
  """An autoencoder with its variables and the geometry of its latents.

  Attributes:
    channels: channels of the latents.
    spatial: pixels per latent in height and in width.
    temporal: video frames per latent frame.
    first: by how many video frames the first latent frame is shorter.
  """

  first = 0

  def __init__(self, module: Any, variables: Variables):
    self.module = module
    self.variables = variables
    self.channels = module.latent_channels
    self.spatial = module.spatial_factor
    self.temporal = module.temporal_factor

  def with_variables(self, variables: Variables) -> "LatentSpace":
    """Returns the space with other variables."""
    other = copy.copy(self)
    other.variables = variables
    return other

  @property
  def image_frames(self) -> int:
    """Video frames of the first latent frame; the first image fills them."""
    return self.temporal - self.first

  def latent_frames(self, frames: int) -> int:
    """Returns how many latent frames a video has, rounded up.

    Args:
      frames: frames of the video.
    """
    return -(-(frames + self.first) // self.temporal)

  def grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Returns the shape of a video's latents, `t h w c`.

    Args:
      frames, height, width: size of the video in frames and pixels.

    Raises:
      errors.UserError: if decoding these latents would give another size.
    """
    surplus = (frames + self.first) % self.temporal
    if surplus or height % self.spatial or width % self.spatial or frames < 1:
      begin = f"{self.image_frames} + " if self.first else ""
      raise errors.UserError(
        f"the autoencoder makes videos of {begin}{self.temporal}k frames "
        f"and multiples of {self.spatial} pixels, found {frames} frames of "
        f"{height}x{width}"
      )
    rows, columns = height // self.spatial, width // self.spatial
    return self.latent_frames(frames), rows, columns, self.channels

  def mask(self, frames: int, last: bool) -> Float[np.ndarray, "t f"]:
    """Returns a mask of the video's frames: 1 where an image is shown.

    Args:
      frames: frames of the video.
      last: whether the video ends with a last image.

    Returns:
      For each latent frame, a value for each of its `temporal` video frames.
    """
    mask = np.zeros((self.latent_frames(frames), self.temporal), np.float32)
    mask[0] = 1
    if last:
      mask[-1, -self.image_frames :] = 1
    return mask

  def clip_frames(self, frames: int) -> int:
    """Returns how many frames of a clip are encoded.

    Args:
      frames: frames of the clip.

    Raises:
      errors.UserError: if the autoencoder refuses clips of this length.
    """
    raise NotImplementedError

  def decoder(self, dtype: Any) -> nn.Module:
    """Returns the module that decodes in a pipeline.

    Args:
      dtype: of the pipeline; the module may decode in another one.
    """
    raise NotImplementedError

  def load_encoder(self) -> None:
    """Loads the encoder, where that waits for the first video.

    Encoding does so, too; free memory is counted after it.
    """

  def encode_whole(self, video: videos.Video) -> Latents:
    """Encodes clips in one piece.

    Args:
      video: clips of any length that `clip_frames` accepts.

    Raises:
      errors.UserError: if the clips do not fit the autoencoder.
    """
    raise NotImplementedError

  def encode_first(self, image: videos.Image, frames: int) -> Latents:
    """Encodes condition videos in one piece: first image, then mid-grey.

    Args:
      image: first images of the videos.
      frames: frames of each video.
    """
    video = videos.condition_video(image, frames, self.image_frames)
    return self.encode_whole(jnp.concatenate([*video], axis=1))

  def encode(
    self, video: Iterable[Any], size: Size, budget: float, tail: str = "pad"
  ) -> Latents:
    """Encodes a video that arrives in pieces, like `encode_whole`.

    Args:
      video: pieces `b t h w 3`.
      size: frames, height and width of the video.
      budget: bytes of device memory for each sample.
      tail: how `streaming.encode` treats frames that do not fill a chunk.

    Raises:
      errors.UserError: if the size does not fit the autoencoder or the budget.
    """
    raise NotImplementedError

  def encode_batch(
    self, x: Any, frames: int, budget: float, condition: bool = False
  ) -> Latents:
    """Encodes clips, or the condition videos of their first images.

    Args:
      x: clips `b t h w 3` or images `b h w 3`, in host memory.
      frames: frames of a clip.
      budget: bytes of device memory for the whole batch.
      condition: whether `x` holds images.
    """
    video = videos.split(x)
    if condition:
      video = videos.condition_video(x, frames, self.image_frames)
    return self.encode(video, (frames, *x.shape[-3:-1]), budget / len(x))

  def condition(
    self,
    first: UInt8[np.ndarray, "h w 3"],
    last: UInt8[np.ndarray, "h w 3"] | None,
    frames: int,
    budget: float,
    tail: str = "pad",
  ) -> Float[Array, "1 tz hz wz c"]:
    """Encodes a condition video: a first image, grey, perhaps a last image.

    Args:
      first, last: the images, in the video's size; last may be None.
      frames: frames of the video; rounded up to whole latent frames.
      budget, tail: as for `encode`.

    Raises:
      errors.UserError: if the frames do not leave room for a last image.
    """
    if last is not None:
      self._check_last(frames)
      last = last[None]
    frames = self.latent_frames(frames) * self.temporal - self.first
    video = videos.condition_video(first[None], frames, self.image_frames, last)
    return self.encode(video, (frames, *first.shape[:2]), budget, tail)

  def decode(
    self, latents: Latents, size: Size, dtype: Any, budget: float
  ) -> Decoded:
    """Decodes in pieces and cuts the video to its size.

    Args:
      latents: latents of the whole video.
      size: frames, height and width of the video.
      dtype: dtype of DC-AE-V's decoder; Wan's decoder is always in float32.
      budget: bytes of device memory for the whole batch.

    Raises:
      errors.UserError: if the budget is too small.
    """
    raise NotImplementedError

  def _check_last(self, frames: int) -> None:
    raise NotImplementedError
