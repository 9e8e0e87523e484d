"""Videos as latents and back: the spaces of DC-AE-V and of Wan's autoencoder.

Latents are as the diffusion model sees them: scaled (DC-AE-V) or normalised
(Wan), float32, `b t h w c`. Encoding computes in float32, on a GPU like PyTorch
with TF32 convolutions: the official code encodes with DC-AE-V in bfloat16,
which visibly hurts image to video.

A clip of 4 (k + 1) frames has k + 1 latent frames in either space: DC-AE-V
takes all frames, Wan's autoencoder the first 1 + 4k. A video is uint8, meaning
0..255, or float, meaning [-1, 1].
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dcvideogen_jax import errors, levels, sharding
from dcvideogen_jax.latents import videos
from dcvideogen_jax.models import bands, dc_ae_v, streaming, wan_vae

Variables = Mapping[str, Any]
Latents = Float[Array, "b t h w c"]
Size = videos.Size
Decoded = Iterator[UInt8[np.ndarray, "b t h w 3"]]

# Of free memory, what encoding and decoding are planned with. The rest is for
# cuDNN's workspaces and for blocks that are free but not next to each other.
SHARE = 0.85
# Activations of Wan's encoder that are held at once, in frames of its first
# width: XLA's program for a CPU holds 16 for four frames.
_WAN_COPIES = 16


class LatentSpace:
  """An autoencoder, its variables, and what its latents count.

  Attributes:
    channels: of the latents.
    spatial: pixels of a latent's side.
    temporal: frames of a latent frame.
    first: frames that the first latent frame has less than the others.
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
    """Frames of the first latent frame, all of which show a first image."""
    return self.temporal - self.first

  def latent_frames(self, frames: int) -> int:
    """Latent frames of a video, rounded up."""
    return -(-(frames + self.first) // self.temporal)

  def grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Latent frames, rows, columns and channels of a video.

    Raises:
      errors.UserError: if the autoencoder would make another size of it.
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
    """Frames of a video by latent frame: 1 where an image is shown."""
    mask = np.zeros((self.latent_frames(frames), self.temporal), np.float32)
    mask[0] = 1
    if last:
      mask[-1, -self.image_frames :] = 1
    return mask

  def encode_whole(self, video: videos.Video) -> Latents:
    """Latents of clips of any number of frames that `clip_frames` takes."""
    raise NotImplementedError

  def encode_first(self, image: videos.Image, frames: int) -> Latents:
    """Latents of the first image of clips of so many frames amid grey."""
    video = videos.condition_video(image, frames, self.image_frames)
    return self.encode_whole(jnp.concatenate([*video], axis=1))

  def encode(
    self, video: Iterable[Any], size: Size, budget: float, tail: str = "pad"
  ) -> Latents:
    """As `encode_whole`, of a video in pieces.

    Args:
      video: pieces `b t h w 3`.
      size: of the video.
      budget: bytes that may be used for a sample.
      tail: what becomes of frames that do not fill a chunk of DC-AE-V, as of
        `streaming.encode`.

    Raises:
      errors.UserError: if the size does not fit or that is not enough.
    """
    raise NotImplementedError

  def encode_batch(
    self, x: Any, frames: int, budget: float, condition: bool = False
  ) -> Latents:
    """Latents of clips, or of their first images amid grey.

    Args:
      x: clips `b t h w 3` or images `b h w 3`, in host memory.
      frames: of a clip.
      budget: bytes that may be used.
      condition: whether `x` are images.
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
  ) -> Float[Array, "1 t h w c"]:
    """The encoded images amid grey.

    Args:
      first: of the video's size.
      last: the same, or None.
      frames: of the video; more are encoded where they fill no latent frame.
      budget, tail: as of `encode`.

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
      latents: of the whole video.
      size: of the video.
      dtype: of the computation, where half precision does not show.
      budget: bytes that may be used.

    Raises:
      errors.UserError: if that is not enough.
    """
    raise NotImplementedError

  def _check_last(self, frames: int) -> None:
    raise NotImplementedError


class DCAEVLatents(LatentSpace):
  """Of DC-AE-V, a `DCAEV`: latent frames hold 4 frames each."""

  def clip_frames(self, frames: int) -> int:
    """All frames of a clip.

    Raises:
      errors.UserError: if they do not fill latent frames.
    """
    if frames <= 0 or frames % self.temporal:
      raise errors.UserError(
        f"DC-AE-V takes a multiple of {self.temporal} frames, found {frames}"
      )
    return frames

  def decoder(self, dtype: Any) -> dc_ae_v.DCAEV:
    """The module that decodes in a pipeline of this dtype."""
    return self.module.clone(dtype=dtype)

  def encode_whole(self, video: videos.Video) -> Latents:
    """Frames that do not fill a chunk are encoded with the last one repeated.

    Raises:
      errors.UserError: if frames, height or width fill no latents.
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
    """Chunk by chunk and in bands."""
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
    """Latents of a video of any length, chunk by chunk as it comes.

    Args:
      video: pieces `b t h w 3`.
      height, width: of the video, multiples of `spatial`.
      budget: bytes that may be used.

    Raises:
      errors.UserError: if that is not enough.
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
    """Chunk by chunk and in bands.

    The latents are rounded to the autoencoder's dtype before they are scaled,
    as in the official pipeline.
    """
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
    """As `decode`, each chunk as soon as its latents are there.

    Args:
      latents: of any number of frames each, in order.
      grid: samples, and rows and columns of the latents.
      size, dtype, budget: as of `decode`.
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
      # Devices of the mesh in force that share a picture's columns.
      devices=sharding.num_shards(jax.sharding.get_abstract_mesh(), "columns"),
    )

  def _check_last(self, frames):
    if frames <= self.temporal:
      raise errors.UserError(
        f"a first and a last image need more than {self.temporal} frames, "
        f"found {frames}"
      )


class WanVAELatents(LatentSpace):
  """Of Wan's own autoencoder, a `WanVAE`: one frame, then 4 per latent frame.

  Latents are means of the posterior, as both public pipelines encode images;
  the official training draws from it.
  """

  def __init__(self, module: Any, variables: Variables):
    super().__init__(module, variables)
    self.first = self.temporal - 1

  def clip_frames(self, frames: int) -> int:
    """Of a clip's frames, those that the autoencoder takes."""
    return self.module.whole_frames(frames, "official")

  def decoder(self, dtype: Any = None) -> wan_vae.WanVAE:
    """The module in float32, whatever the dtype: half precision shows."""
    del dtype
    return self.module.clone(dtype=jnp.float32)

  def encode_whole(self, video: videos.Video) -> Latents:
    """Of the first 1 + 4k frames."""
    module = self.decoder()
    video = levels.to_float(video[:, : self.clip_frames(video.shape[1])])
    posterior = module.apply(self.variables, video, method="encode")
    return module.normalise(posterior.mean)

  def encode(
    self, video: Iterable[Any], size: Size, budget: float, tail: str = "pad"
  ) -> Latents:
    """Latent frame by latent frame, of the first 1 + 4k frames."""
    del size, budget, tail  # There are neither bands nor chunks.
    module = self.decoder()
    posteriors = wan_vae.stream_encode(
      module, self.variables, video, tail="official"
    )
    means = [posterior.mean for posterior in posteriors]
    return module.normalise(jnp.concatenate(means, axis=1))

  def encode_batch(
    self, x: Any, frames: int, budget: float, condition: bool = False
  ) -> Latents:
    """In one program if that fits."""
    pixels = len(x) * frames * x.shape[-3] * x.shape[-2]
    if 4 * _WAN_COPIES * self.module.base_width * pixels > budget:
      return super().encode_batch(x, frames, budget, condition)
    chosen = frames if condition else None
    return encode_at_once(self.module, self.variables, x, chosen)

  def decode(
    self, latents: Latents, size: Size, dtype: Any, budget: float
  ) -> Decoded:
    """Latent frame by latent frame, whole frames, in float32."""
    del dtype, budget  # There are no bands.
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


# By the names that encoded clips have them, see `data.latents`.
SPACES = {"base": WanVAELatents, "deep": DCAEVLatents}


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_at_once(
  module: wan_vae.WanVAE, variables: Variables, x: Any, frames: int | None
) -> Latents:
  """Wan's latents of clips; of first images with a number of frames."""
  space = WanVAELatents(module, variables)
  return space.encode_first(x, frames) if frames else space.encode_whole(x)


def _unscale(latents, scale, dtype):
  return (latents.astype(dtype) / jnp.asarray(scale, dtype)).astype(jnp.float32)
