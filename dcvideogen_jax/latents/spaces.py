"""The latent spaces of DC-AE-V and Wan's autoencoder: encoding and decoding.

Latents `b tz hz wz c` are scaled (DC-AE-V) or normalised (Wan) for diffusion
models, in float32. Encoding computes in float32; convolutions on a GPU use
TF32, as PyTorch's do. Encoding with DC-AE-V in bfloat16, as in the official
code, visibly hurts image to video. Videos are uint8 levels or floats in [-1,
1].

A clip of 4 (k + 1) frames has k + 1 latent frames in both spaces: DC-AE-V
encodes all frames, Wan's autoencoder only the first 1 + 4k.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors, levels, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.latents import videos
from dcvideogen_jax.models import bands, dc_ae_v, streaming, wan_vae

Variables = Mapping[str, Any]
Latents = Float[Array, "b tz hz wz c"]
Size = videos.Size
Decoded = Iterator[UInt8[np.ndarray, "b t h w 3"]]

# Share of the free memory that encoding and decoding are planned with. The
# remainder is for cuDNN's workspaces and for fragmentation.
SHARE = 0.85
# Activations of a whole clip, `base_width` channels wide, that Wan's encoder
# holds at once: XLA's program for a CPU holds 16 for a clip of four frames.
_WAN_COPIES = 16


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

  @property
  def image_frames(self) -> int:
    """Video frames of the first latent frame; the first image fills them."""
    return self.temporal - self.first

  def latent_frames(self, frames: int) -> int:
    """Returns how many latent frames a video has, rounded up."""
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
    """Returns a mask of the video's frames: 1 where an image is shown."""
    mask = np.zeros((self.latent_frames(frames), self.temporal), np.float32)
    mask[0] = 1
    if last:
      mask[-1, -self.image_frames :] = 1
    return mask

  def encode_whole(self, video: videos.Video) -> Latents:
    """Encodes clips in one piece, of any length that `clip_frames` accepts."""
    raise NotImplementedError

  def encode_first(self, image: videos.Image, frames: int) -> Latents:
    """Encodes condition videos of `frames` frames: first image, then grey."""
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


class DCAEVLatents(LatentSpace):
  """The latents of DC-AE-V, a `DCAEV`: each latent frame holds 4 frames."""

  def clip_frames(self, frames: int) -> int:
    """Returns how many frames of a clip are encoded: all of them.

    Raises:
      errors.UserError: if the frames do not fill whole latent frames.
    """
    if frames <= 0 or frames % self.temporal:
      raise errors.UserError(
        f"DC-AE-V takes a multiple of {self.temporal} frames, found {frames}"
      )
    return frames

  def decoder(self, dtype: Any) -> dc_ae_v.DCAEV:
    """Returns the module that decodes in a pipeline of this dtype."""
    return self.module.clone(dtype=dtype)

  def encode_whole(self, video: videos.Video) -> Latents:
    """Encodes clips; repeats the last frame until it fills a chunk.

    Raises:
      errors.UserError: if frames, height or width do not fill whole latents.
    """
    module = self._exact
    frames = self.clip_frames(video.shape[1])
    if any(size % self.spatial for size in video.shape[2:4]):
      raise errors.UserError(
        f"clips are multiples of {self.spatial} pixels, found "
        f"{video.shape[2]}x{video.shape[3]}"
      )
    video = levels.to_float(video)
    latents = module.apply(self.variables, video, method="encode")
    return latents[:, : frames // self.temporal] * module.latent_scale

  def encode(
    self, video: Iterable[Any], size: Size, budget: float, tail: str = "pad"
  ) -> Latents:
    """Encodes chunk by chunk, in bands; arguments as for `LatentSpace`."""
    frames, height, width = size
    streamed = frames > self.module.chunk_frames
    wanted = self.clip_frames(frames) // self.temporal
    module = self._exact
    plan = self._plan(module, height, width, budget, False, streamed)
    chunks = streaming.encode(
      module, self.variables, video, plan=plan, tail=tail
    )
    latents = jnp.concatenate(list(chunks), axis=1)
    return latents[:, :wanted] * module.latent_scale

  def encode_stream(
    self, video: Iterable[Any], height: int, width: int, budget: float
  ) -> Iterator[Latents]:
    """Yields the latents of each chunk as soon as its frames have arrived.

    Args:
      video: pieces `b t h w 3`, any number of them.
      height, width: size of the video in pixels, multiples of `spatial`.
      budget: bytes of device memory for each sample.

    Raises:
      errors.UserError: if the budget is too small.
    """
    module = self._exact
    plan = self._plan(module, height, width, budget, False, True)
    for latents in streaming.encode(
      module, self.variables, video, plan=plan, eager=True
    ):
      yield latents * module.latent_scale

  def decode(
    self, latents: Latents, size: Size, dtype: Any, budget: float
  ) -> Decoded:
    """Decodes chunk by chunk, in bands; arguments as for `LatentSpace`."""
    b, t, *grid, _ = latents.shape
    chunk = self.module.chunk_frames // self.temporal
    chunks = (latents[:, i : i + chunk] for i in range(0, t, chunk))
    return self._decode(chunks, (b, *grid), size, dtype, budget, t > chunk)

  def decode_stream(
    self,
    latents: Iterable[Latents],
    grid: tuple[int, int, int],
    size: Size,
    dtype: Any,
    budget: float,
  ) -> Decoded:
    """Decodes each chunk as soon as its latents have arrived.

    Args:
      latents: pieces of any number of latent frames, in order.
      grid: the number of samples and the rows and columns of their latents.
      size, dtype, budget: as for `decode`.
    """
    return self._decode(latents, grid, size, dtype, budget, True, eager=True)

  def _decode(self, latents, grid, size, dtype, budget, streamed, **options):
    module = self.decoder(dtype)
    b, height, width = grid[0], *(n * self.spatial for n in grid[1:])
    plan = self._plan(module, height, width, budget / b, True, streamed)
    unscaled = (_unscale(x, module.latent_scale, dtype) for x in latents)
    chunks = streaming.decode(
      module, self.variables, unscaled, plan=plan, dtype=np.uint8, **options
    )
    return videos.cut(chunks, size)

  @property
  def _exact(self):
    return self.module.clone(dtype=jnp.float32)

  def _plan(self, module, height, width, budget, decode, streamed):
    return bands.plan(
      module,
      height,
      width,
      budget,
      decode=decode,
      streamed=streamed,
      # The devices of the current mesh that share the columns of a frame.
      devices=sharding.num_shards(jax.sharding.get_abstract_mesh(), "columns"),
    )

  def _check_last(self, frames):
    if frames <= self.temporal:
      raise errors.UserError(
        f"a first and a last image need more than {self.temporal} frames, "
        f"found {frames}"
      )


class WanVAELatents(LatentSpace):
  """The latents of Wan's autoencoder, a `WanVAE`: means of the posterior.

  Both public pipelines take the mean; the official training draws a sample.
  """

  def __init__(self, module: Any, variables: Variables):
    super().__init__(module, variables)
    self.first = self.temporal - 1

  def clip_frames(self, frames: int) -> int:
    """Returns how many frames of a clip are encoded: the first 1 + 4k."""
    return self.module.whole_frames(frames, "official")

  def decoder(self, dtype: Any = None) -> wan_vae.WanVAE:
    """Returns the module in float32: half precision would be visible."""
    del dtype
    return self.module.clone(dtype=jnp.float32)

  def encode_whole(self, video: videos.Video) -> Latents:
    """Encodes the first 1 + 4k frames of clips."""
    module = self.decoder()
    video = levels.to_float(video[:, : self.clip_frames(video.shape[1])])
    posterior = module.apply(self.variables, video, method="encode")
    return module.normalise(posterior.mean)

  def encode(
    self, video: Iterable[Any], size: Size, budget: float, tail: str = "pad"
  ) -> Latents:
    """Encodes the first 1 + 4k frames, one latent frame after another."""
    del size, budget, tail  # Wan's encoder has neither bands nor chunks.
    module = self.decoder()
    posteriors = wan_vae.stream_encode(
      module, self.variables, video, tail="official"
    )
    means = [posterior.mean for posterior in posteriors]
    return module.normalise(jnp.concatenate(means, axis=1))

  def encode_batch(
    self, x: Any, frames: int, budget: float, condition: bool = False
  ) -> Latents:
    """Encodes in one compiled program if it fits into the budget."""
    pixels = len(x) * frames * x.shape[-3] * x.shape[-2]
    if 4 * _WAN_COPIES * self.module.base_width * pixels > budget:
      return super().encode_batch(x, frames, budget, condition)
    chosen = frames if condition else None
    return encode_at_once(self.module, self.variables, x, chosen)

  def decode(
    self, latents: Latents, size: Size, dtype: Any, budget: float
  ) -> Decoded:
    """Decodes one latent frame at a time, in float32 and without bands."""
    del dtype, budget  # Wan's decoder is always in float32, without bands.
    module = self.decoder()
    unscaled = module.denormalise(latents)
    frames = (unscaled[:, i : i + 1] for i in range(latents.shape[1]))
    video = wan_vae.stream_decode(
      module, self.variables, frames, dtype=np.uint8
    )
    return videos.cut(video, size)

  def _check_last(self, frames):
    if frames == 1 or (frames - 1) % self.temporal:
      raise errors.UserError(
        f"with a last image, Wan's models make 1 + {self.temporal}k frames, "
        f"found {frames}"
      )


# The spaces, by the names of their latents in encoded clips (`data.latents`).
SPACES = {"base": WanVAELatents, "deep": DCAEVLatents}


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_at_once(
  module: wan_vae.WanVAE, variables: Variables, x: Any, frames: int | None
) -> Latents:
  """Compiles Wan's `encode_whole`, or `encode_first` if `frames` is given.

  Args:
    module, variables: Wan's autoencoder and its parameters.
    x, frames: clips and None, or first images and the condition videos' frames.
  """
  space = WanVAELatents(module, variables)
  return space.encode_first(x, frames) if frames else space.encode_whole(x)


def _unscale(latents, scale, dtype):
  """Rounds to `dtype` before dividing, as the official pipeline does."""
  return (latents.astype(dtype) / jnp.asarray(scale, dtype)).astype(jnp.float32)
