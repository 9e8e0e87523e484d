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
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcvideogen_jax import errors, levels, sharding
from dcvideogen_jax.latents import latent_space, videos
from dcvideogen_jax.models import bands, dc_ae_v, streaming, wan_vae

Variables = latent_space.Variables
Latents = latent_space.Latents
Size = latent_space.Size
Decoded = latent_space.Decoded

# Activations of a whole clip, `base_width` channels wide, that Wan's encoder
# holds at once: XLA's program for a CPU holds 16 for a clip of four frames.
_WAN_COPIES = 16


class DCAEVLatents(latent_space.LatentSpace):
  """The latents of DC-AE-V, a `DCAEV`: each latent frame holds 4 frames."""

  def __init__(
    self,
    module: dc_ae_v.DCAEV,
    variables: Variables,
    decoder: dc_ae_v.DCAEV | None = None,
  ):
    """Builds the space.

    Args:
      module: the autoencoder.
      variables: its parameters, those of the decoder that is used among them.
      decoder: decodes instead of `module`, whose latents it takes.
    """
    super().__init__(module, variables)
    self._decoder = decoder or module

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
    return self._decoder.clone(dtype=dtype)

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


class WanVAELatents(latent_space.LatentSpace):
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
