"""What the pipeline needs of an autoencoder: DC-AE-V's form and Wan's.

Both are used through the same methods. Latents are as the diffusion model sees
them: scaled (DC-AE-V) or normalised (Wan), float32, `b t h w c`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.adapt import encode
from dcvideogen_jax.models import bands, dc_ae_v, streaming, wan_vae
from dcvideogen_jax.sample import sizes

# Levels, or floats in [-1, 1].
Image = UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"]
Condition = Float[Array, "1 t h w c"]


class _Space:
  """An autoencoder and what its latents count."""

  def __init__(self, module: Any, variables: Mapping[str, Any]):
    self.module = module
    self.variables = variables
    self.channels = module.latent_channels
    self.spatial = module.spatial_factor
    self.temporal = module.temporal_factor


class Deep(_Space):
  """DC-AE-V: latent frames hold 4 frames each; `module` is a `DCAEV`."""

  # Frames that the first latent frame has less than the others.
  first = 0

  def decoder(self, dtype: Any) -> dc_ae_v.DCAEV:
    """The module that decodes in a pipeline of this dtype."""
    return self.module.clone(dtype=dtype)

  def condition(
    self,
    first: Image,
    last: Image | None,
    frames: int,
    budget: float,
    tail: str = "pad",
  ) -> Condition:
    """The encoded images, each repeated for one latent frame, amid grey.

    Encoded in float32 (on a GPU, like PyTorch, with TF32 convolutions): half
    precision visibly hurts.

    Args:
      first: of the video's size.
      last: the same, or None.
      frames: of the video.
      budget: bytes that may be used.
      tail: what becomes of frames that do not fill a chunk, as of
        `streaming.encode`.

    Raises:
      errors.UserError: if there are too few frames for two images.
    """
    module = self.module.clone(dtype=jnp.float32)
    if last is not None and frames <= self.temporal:
      raise errors.UserError(
        f"a first and a last image need more than {self.temporal} frames, "
        f"found {frames}"
      )
    frames = -(-frames // self.temporal) * self.temporal
    video = encode.condition_video(
      first[None], frames, self.temporal, _one(last)
    )
    plan = bands.plan(
      module,
      *first.shape[:2],
      budget,
      decode=False,
      streamed=frames > module.chunk_frames,
      devices=_sharing(),
    )
    return encode.stream_deep(module, self.variables, video, frames, plan, tail)

  def encode(
    self,
    video: Iterable[Any],
    height: int,
    width: int,
    budget: float,
  ) -> Iterator[Float[Array, "b t h w c"]]:
    """Latents of a video of any length, chunk by chunk as it comes.

    Args:
      video: pieces `b t h w 3`, levels or floats in [-1, 1].
      height, width: of the video, multiples of `spatial`.
      budget: bytes that may be used.

    Raises:
      errors.UserError: if that is not enough.
    """
    module = self.module.clone(dtype=jnp.float32)
    plan = bands.plan(
      module, height, width, budget, decode=False, devices=_sharing()
    )
    for latents in streaming.encode(
      module, self.variables, video, plan=plan, eager=True
    ):
      yield latents * module.latent_scale

  def mask(self, frames: int, last: bool) -> np.ndarray:
    """1 for conditioned frames: (latent frames, 4)."""
    mask = np.zeros((-(-frames // self.temporal), self.temporal), np.float32)
    mask[0] = 1
    if last:
      mask[-1] = 1
    return mask

  def decode(
    self,
    latents: Float[Array, "b t h w c"],
    size: sizes.Size,
    dtype: Any,
    budget: float,
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Decodes chunk by chunk and cuts the video to its size.

    The latents are rounded to the autoencoder's dtype before they are scaled,
    as in the official pipeline.
    """
    b, t, *grid, _ = latents.shape
    chunk = self.module.chunk_frames // self.temporal
    pieces = (latents[:, i : i + chunk] for i in range(0, t, chunk))
    plan = self._decoding(b, grid, dtype, budget, t > chunk)
    return self._decoded(pieces, size, dtype, plan)

  def decode_stream(
    self,
    pieces: Iterable[Float[Array, "b t h w c"]],
    grid: tuple[int, int, int],
    size: sizes.Size,
    dtype: Any,
    budget: float,
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """As `decode`, each chunk as soon as its latents are there.

    Args:
      pieces: latents of any number of frames, in order.
      grid: samples, and rows and columns of the latents.
      size: of the whole video.
      dtype: of the computation.
      budget: bytes that may be used.
    """
    plan = self._decoding(grid[0], grid[1:], dtype, budget, True)
    return self._decoded(pieces, size, dtype, plan, eager=True)

  def _decoding(self, b, grid, dtype, budget, streamed):
    return bands.plan(
      self.decoder(dtype),
      *(n * self.spatial for n in grid),
      budget / b,
      decode=True,
      streamed=streamed,
      devices=_sharing(),
    )

  def _decoded(self, pieces, size, dtype, plan, **options):
    module = self.decoder(dtype)
    scale = module.latent_scale
    unscaled = (_unscale(piece, scale, dtype=dtype) for piece in pieces)
    chunks = streaming.decode(
      module, self.variables, unscaled, plan=plan, dtype=np.uint8, **options
    )
    return _cut(chunks, size)


class Wan(_Space):
  """Wan's own autoencoder, a `WanVAE`: one frame, then 4 per latent frame."""

  first = 3

  def decoder(self, dtype: Any) -> wan_vae.WanVAE:
    """The same in float32, whatever the dtype: half precision shows."""
    del dtype
    return self.module.clone(dtype=jnp.float32)

  def condition(
    self,
    first: Image,
    last: Image | None,
    frames: int,
    budget: float,
    tail: str = "pad",
  ) -> Condition:
    """The encoded images amid grey; the mean of the posterior, normalised.

    Raises:
      errors.UserError: if a last image would not be the last frame.
    """
    del budget, tail  # There are neither bands nor chunks.
    if last is not None and (frames == 1 or (frames - 1) % self.temporal):
      raise errors.UserError(
        f"with a last image, Wan's models make 1 + {self.temporal}k frames, "
        f"found {frames}"
      )
    frames = 1 - (1 - frames) // self.temporal * self.temporal
    video = encode.condition_video(first[None], frames, 1, _one(last))
    return encode.stream_base(self.module, self.variables, video)

  def mask(self, frames: int, last: bool) -> np.ndarray:
    """1 for conditioned frames: (latent frames, 4), the first frame 4 times."""
    latent_frames = 1 - (1 - frames) // self.temporal
    mask = np.zeros((latent_frames, self.temporal), np.float32)
    mask[0] = 1
    if last:
      mask[-1, -1] = 1
    return mask

  def decode(
    self,
    latents: Float[Array, "b t h w c"],
    size: sizes.Size,
    dtype: Any,
    budget: float,
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Decodes latent frame by latent frame, whole frames, in float32."""
    del budget  # There are no bands.
    module = self.decoder(dtype)
    unscaled = module.denormalise(latents)
    pieces = (unscaled[:, i : i + 1] for i in range(latents.shape[1]))
    return _cut(
      wan_vae.stream_decode(module, self.variables, pieces, dtype=np.uint8),
      size,
    )


def _one(image: Image | None) -> Float[np.ndarray, "1 h w 3"] | None:
  """A batch of one image, if there is one."""
  return None if image is None else image[None]


def _sharing() -> int:
  """Devices of the mesh in force that share a picture's columns."""
  return sharding.num_shards(jax.sharding.get_abstract_mesh(), "columns")


def _unscale(latents, scale, dtype):
  return (latents.astype(dtype) / jnp.asarray(scale, dtype)).astype(jnp.float32)


def _cut(chunks, size: sizes.Size):
  """Leaves out frames, rows and columns beyond the size."""
  left = size.frames
  for chunk in chunks:
    if left <= 0:
      return
    yield chunk[:, :left, : size.height, : size.width]
    left -= chunk.shape[1]
