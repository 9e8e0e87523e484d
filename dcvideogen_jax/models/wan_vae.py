"""The Wan 2.1 autoencoder: f8t4c16, causal in time, 1 + 4k frames.

Follows Wan-Video/Wan2.1 `wan/modules/vae.py` (commit 9737cba) and diffusers
`AutoencoderKLWan` (commit 58eb52c), whose module names it keeps so that the
conversion table stays short. The first frame of a clip has a latent frame of
its own; every later latent frame stands for `temporal_factor` frames.

Deviations: a whole clip is one call and not a loop over its latent frames,
with the same result; normalisation is always computed in float32; frames that
do not fill a latent frame are refused instead of dropped; rows and columns that
do not fill a latent are padded instead of dropped; `decode` does not clamp
unless asked.

Memory. `stream_encode` and `stream_decode` hold some activations of
`temporal_factor` frames at full resolution and `base_width` channels (0.6 GB
each at 480x832 in float32), and two cached frames per convolution. The programs
that XLA compiles for a CPU need 9.5 + 2.2 GB and 8.5 + 3.8 GB for that. A call
on a whole clip holds activations of all its frames.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax import errors, memory, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import (
  calls,
  dc_ae_v,
  fields,
  pieces,
  precision,
  wan_vae_layers,
)

Video = Float[Array, "b t h w 3"]
Latents = Float[Array, "b tz hz wz c"]
Variables = dict[str, Any]

_exact = precision.of_float32(precision.CONVOLUTIONS)


class Posterior(NamedTuple):
  """Normal distributions of latents before `WanVAE.normalise`.

  Attributes:
    mean: the mean, which both public pipelines use as the latents.
    logvar: logarithm of the variance, clipped to [-30, 20].
  """

  mean: Latents
  logvar: Latents


class WanVAE(nn.Module):
  """Wan's autoencoder: video in [-1, 1] to a posterior of latents, and back.

  The defaults of the fields are the released model. Axes `tz hz wz` count
  latent frames, rows and columns.

  Example:
    module = wan_vae.build(wan_vae.VARIANTS["wan2.1"])
    posterior = module.apply(variables, video, method="encode")
    latents = module.normalise(posterior.mean)
    latents = module.denormalise(latents)
    video = module.apply(variables, latents, method="decode")

  Attributes:
    latent_channels: channels of the latents.
    base_width: channels at full resolution.
    multipliers: channels of each level, fine to coarse, as multiples of
      `base_width`; each level after the first halves height and width.
    blocks: residual blocks of each level in the encoder; the decoder has one
      more in each level.
    temporal: whether the step from each level to the next halves the frames.
    mean: mean of the latents of many videos, per channel.
    std: standard deviation of these latents, per channel.
    conv3d: implementation of `ops.conv3d`; with None, `ops.conv3d` chooses.
    dtype: dtype of the computation, except for norms, which run in float32.
    param_dtype: dtype of the parameters.
  """

  latent_channels: int = 16
  base_width: int = 96
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  temporal: tuple[bool, ...] = (False, True, True)
  # fmt: off
  mean: tuple[float, ...] = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
  )
  std: tuple[float, ...] = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
  )
  # fmt: on
  conv3d: str | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self):
    """Builds both halves and the convolutions around the latents."""
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    names = ("base_width", "multipliers", "blocks", "temporal", "conv3d")
    shared = {name: getattr(self, name) for name in names}
    shared |= {"channels": self.latent_channels, "dtypes": dtypes}
    self.encoder = wan_vae_layers.Encoder(**shared)
    self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1, 1), **dtypes)
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1, 1), **dtypes)
    self.decoder = wan_vae_layers.Decoder(**shared)

  @property
  def spatial_factor(self) -> int:
    """Pixels per latent in height and in width."""
    return 2 ** len(self.temporal)

  @property
  def temporal_factor(self) -> int:
    """Frames per latent frame after the first, which stands for one frame."""
    return 2 ** sum(self.temporal)

  def __call__(self, video: Video) -> Video:
    """Encodes clips and decodes the means of their posteriors.

    Args:
      video: as `encode` takes it.

    Returns:
      The reconstruction of the padded video, not clamped.
    """
    return self.decode(self.encode(video).mean)

  def encode(self, video: Video, tail: str = "refuse") -> Posterior:
    """Encodes clips, or the beginning of clips with `"cache"` mutable.

    Args:
      video: float in [-1, 1], 1 + k * `temporal_factor` frames; an image is
        one frame. Rows and columns are padded to a multiple of
        `spatial_factor` by repeating the edge.
      tail: treatment of frames that do not fill a latent frame: "refuse"
        raises; "official" drops them, as the reference does.

    Returns:
      The posterior of 1 + k latent frames. Height and width of the padded video
      are divided by `spatial_factor`.

    Raises:
      errors.UserError: if there are no frames, or with "refuse" another number
        than 1 + k * `temporal_factor`.
      ValueError: if `tail` is unknown.
    """
    video = video[:, : self.whole_frames(video.shape[1], tail)]
    return self._encode(video, first=True)

  def encode_next(self, video: Video) -> Posterior:
    """Continues the clip of `encode`, with `"cache"` mutable.

    Encodes k * `temporal_factor` frames into the posterior of k latent frames.

    Raises:
      errors.UserError: if the frames are not a multiple of `temporal_factor`.
    """
    if video.shape[1] % self.temporal_factor:
      raise errors.UserError(
        f"a clip continues by a multiple of {self.temporal_factor} frames, "
        f"found {video.shape[1]}"
      )
    return self._encode(video, first=False)

  def decode(self, latents: Latents, clamp: bool = False) -> Video:
    """Decodes clips, or the beginning of clips with `"cache"` mutable.

    Args:
      latents: 1 + k latent frames, not normalised.
      clamp: whether to clamp the video to [-1, 1], as both public decoders do.

    Returns:
      1 + k * `temporal_factor` frames.
    """
    return self._decode(latents, clamp, first=True)

  def decode_next(self, latents: Latents, clamp: bool = False) -> Video:
    """Continues the clip of `decode`, with `"cache"` mutable.

    Decodes k latent frames into k * `temporal_factor` frames.
    """
    return self._decode(latents, clamp, first=False)

  def normalise(self, latents: Latents) -> Latents:
    """Returns the normalised latents that a diffusion model works on.

    This method needs no variables: call it on the unbound module.
    """
    return (latents - self._row(self.mean)) / self._row(self.std)

  def denormalise(self, latents: Latents) -> Latents:
    """Undoes `normalise`."""
    return latents * self._row(self.std) + self._row(self.mean)

  def whole_frames(self, frames: int, tail: str = "refuse") -> int:
    """Returns how many of `frames` frames `encode` encodes with that `tail`.

    Raises:
      errors.UserError: if `encode` refuses that many frames.
      ValueError: if `tail` is unknown.
    """
    factor = self.temporal_factor
    extra = (frames - 1) % factor
    if tail not in ("refuse", "official"):
      raise ValueError(f"tail is {tail!r}, expected refuse or official")
    if frames < 1 or (extra and tail == "refuse"):
      nearest = [n for n in (frames - extra, frames - extra + factor) if n > 0]
      raise errors.UserError(
        f"the Wan autoencoder takes 1 + {factor}k frames, found {frames}: "
        f"use {' or '.join(map(str, nearest))}"
      )
    return frames - extra

  @_exact
  def _encode(self, video, first):
    video = dc_ae_v.pad_edge(video, 1, self.spatial_factor)
    moments = self.quant_conv(self.encoder(video, first))
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30, 20))

  @_exact
  def _decode(self, latents, clamp, first):
    video = self.decoder(self.post_quant_conv(latents), first)
    return jnp.clip(video, -1, 1) if clamp else video

  def _row(self, values):
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)


def stream_encode(
  module: WanVAE,
  variables: Variables,
  video: Iterable[Any],
  *,
  tail: str = "refuse",
) -> Iterator[Posterior]:
  """Encodes a video of any length latent frame by latent frame.

  Two programs are compiled, one for the first frame and one for every
  `temporal_factor` frames after it. Memory does not grow with the length.

  Args:
    module: the model.
    variables: `{"params": ...}`.
    video: pieces (b, t, h, w, 3) of any number of frames, in order; uint8 in
      0..255 or float in [-1, 1].
    tail: as in `WanVAE.encode`.

  Yields:
    The posterior of each latent frame.

  Raises:
    errors.UserError: if a piece is not a video; or, after all whole latent
      frames were yielded, if frames remain and `tail` is "refuse".
    ValueError: if there are no frames, or the pieces differ in more than their
      frames.
  """
  state, seen = None, 0
  video = (pieces.require_video(piece) for piece in video)
  size = module.temporal_factor
  chunks = pieces.regroup(video, size, eager=True, first=1)
  for chunk, _ in memory.bounded(chunks):
    method = "encode_next" if seen else "encode"
    seen += chunk.shape[1]
    if module.whole_frames(seen, tail) < seen:
      return
    args = (module, method, variables, calls.put(chunk))
    state = state or calls.empty_state(*args)
    posterior, state = calls.apply(*args, state=state)
    yield posterior


def stream_decode(
  module: WanVAE,
  variables: Variables,
  latents: Iterable[Any],
  *,
  dtype: Any = np.float32,
) -> Iterator[Float[np.ndarray, "b t h w 3"]]:
  """Decodes latents of any length one latent frame at a time.

  Args:
    module: the model.
    variables: `{"params": ...}`.
    latents: pieces (b, t, h, w, c) of any number of latent frames, in order,
      not normalised.
    dtype: dtype of the video; uint8 is clipped and rounded, a float dtype is
      not clamped.

  Yields:
    One frame, then `temporal_factor` frames per latent frame, in host memory.

  Raises:
    errors.UserError: if the latents do not have the model's channels.
    ValueError: if there are no latents, or the pieces differ in more than their
      frames.
  """
  state = None
  chunks = pieces.regroup(latents, 1, eager=True, noun="latents")
  for chunk, _ in memory.bounded(chunks):
    pieces.require_latents(chunk, module)
    method = "decode_next" if state else "decode"
    args = (module, method, variables, calls.put(chunk))
    state = state or calls.empty_state(*args)
    video, state = calls.apply(*args, state=state, dtype=np.dtype(dtype))
    yield sharding.to_host(video)


# The released model, whose fields are the defaults of `WanVAE`.
VARIANTS: dict[str, dict[str, Any]] = {"wan2.1": {}}


def build(config: Mapping[str, Any], **overrides: Any) -> WanVAE:
  """Builds the module that a configuration describes.

  Args:
    config: fields of `WanVAE` by name, such as a row of `VARIANTS`.
    **overrides: fields that replace those of `config`.

  Raises:
    ValueError: if a field is unknown or the fields do not fit together.
  """
  module = fields.build(WanVAE, "the Wan autoencoder", config, overrides)
  _check(module)
  return module


# Each level after the first halves the picture, so that 17 reduce 65536 pixels
# to one.
_MOST_LEVELS = 17


def _check(m: WanVAE) -> None:
  """Raises ValueError if fields do not fit together."""
  fields.count("latent_channels", m.latent_channels)
  fields.count("base_width", m.base_width)
  fields.layers("blocks", m.blocks)
  fields.count(
    "the number of multipliers", len(m.multipliers), most=_MOST_LEVELS
  )
  for i, n in enumerate(m.multipliers):
    fields.count(f"multipliers[{i}]", n)
  for i, value in enumerate(m.temporal):
    if not isinstance(value, bool):
      raise ValueError(
        f"temporal[{i}] is {fields.told(value)}, expected true or false"
      )
  if len(m.temporal) != len(m.multipliers) - 1:
    raise ValueError(
      f"{len(m.multipliers)} multipliers but {len(m.temporal)} steps in "
      f"temporal, expected one fewer"
    )
  for name in ("mean", "std"):
    if len(getattr(m, name)) != m.latent_channels:
      raise ValueError(
        f"{name} has {len(getattr(m, name))} values, "
        f"expected latent_channels, {m.latent_channels}"
      )
  for i in range(m.latent_channels):
    fields.finite(f"mean[{i}]", m.mean[i])
    fields.positive(f"std[{i}]", m.std[i])
  for level, n in enumerate(m.multipliers[1:], 1):
    if m.base_width * n % 2:
      raise ValueError(
        f"level {level} has {m.base_width * n} channels, which an upsampling "
        "block cannot halve"
      )
