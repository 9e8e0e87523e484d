"""Encoder and decoder of the Wan 2.1 autoencoder and their blocks.

Follows Wan-Video/Wan2.1 `wan/modules/vae.py` (commit 9737cba) and diffusers
`autoencoder_kl_wan.py` (commit 58eb52c), whose lists of cached features are
Linen's `"cache"` collection here. With that collection mutable, the input
continues the clip of the previous call; otherwise the input is a whole clip.

`first` tells whether the first input frame is the first frame of the clip. Both
resamplings in time pass that frame on unchanged. `dtypes` holds `dtype` and
`param_dtype`; `conv3d` names an implementation of `ops.conv3d`, and None lets
`ops.conv3d` choose.
"""

import math
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import chunk_causal
from dcvideogen_jax.ops import attention


def conv(features: int, conv3d: str | None = None, **fields: Any) -> nn.Module:
  """Builds a 3x3x3 convolution over each frame and the two frames before it.

  Args:
    features: output channels.
    conv3d: implementation of `ops.conv3d`; None lets it choose.
    **fields: further fields of `chunk_causal.Conv`.

  Returns:
    A module that returns a pair; the first element is the output.
  """
  return chunk_causal.Conv(
    features, chunk=1, time="causal", conv3d=conv3d, **fields
  )


class UnitNorm(nn.Module):
  """Root-mean-square normalisation over channels, with a learned scale.

  Computed in float32 whatever the input's dtype; returns `dtype`. Unlike
  `layers.RMSNorm`, it has no epsilon but a lower bound of the squared length.
  """

  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Normalises each position.

    Args:
      x: features.
    """
    c = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (c,), self.param_dtype)
    scale = scale.astype(jnp.float32).reshape(1, 1, 1, 1, c)
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * math.sqrt(c)
    return (x * scale).astype(self.dtype)


class ResBlock(nn.Module):
  """A residual block: x + conv(silu(norm(conv(silu(norm(x)))))).

  The shortcut is projected if the number of channels changes.
  """

  features: int
  dtypes: Mapping[str, Any]
  conv3d: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w f"]:
    """Applies the block.

    Args:
      x: features.
    """
    y = x
    for i in (1, 2):
      y = nn.silu(UnitNorm(**self.dtypes, name=f"norm{i}")(y))
      y, _ = conv(self.features, self.conv3d, **self.dtypes, name=f"conv{i}")(y)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1, 1), **self.dtypes, name="shortcut")(x)
    return x + y


class Attention(nn.Module):
  """x + self-attention with one head over the positions of each frame."""

  dtypes: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Applies the layer.

    Args:
      x: features.
    """
    b, _, h, w, c = x.shape
    y = UnitNorm(**self.dtypes, name="norm")(x)
    y = nn.Conv(3 * c, (1, 1), **self.dtypes, name="to_qkv")(y)
    y = einops.rearrange(y, "b t h w (s c) -> s (b t) (h w) 1 c", s=3)
    y = attention.sharded_attention(*y, keys=None, heads=None)
    y = einops.rearrange(y, "(b t) (h w) 1 c -> b t h w c", b=b, h=h, w=w)
    return x + nn.Conv(c, (1, 1), **self.dtypes, name="proj")(y)


class MidBlock(nn.Module):
  """Attention between two residual blocks, at the coarsest resolution."""

  dtypes: Mapping[str, Any]
  conv3d: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Applies the three layers.

    Args:
      x: features.
    """
    fields = (x.shape[-1], self.dtypes, self.conv3d)
    x = ResBlock(*fields, name="resnets_0")(x)
    x = Attention(self.dtypes, name="attention")(x)
    return ResBlock(*fields, name="resnets_1")(x)


class TimeConv(nn.Module):
  """A convolution of three frames without padding, as one matrix product.

  Attributes:
    features: output channels.
    stride: input frames from one output frame to the next.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
  """

  features: int
  stride: int = 1
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b u h w f"]:
    """Convolves each position over time.

    Args:
      x: features, 3 frames or more.
    """
    shape = (3, 1, 1, x.shape[-1], self.features)
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), shape, self.param_dtype
    )
    bias = self.param(
      "bias", nn.initializers.zeros, (self.features,), self.param_dtype
    )
    x = x.astype(self.dtype)
    last = x.shape[1] - 2
    x = jnp.concatenate(
      [x[:, i : last + i : self.stride] for i in range(3)], axis=-1
    )
    y = jnp.dot(x, kernel.astype(self.dtype).reshape(-1, self.features))
    return y + bias.astype(self.dtype).reshape(1, 1, 1, 1, -1)


class Down(nn.Module):
  """Halves height and width, and frames after the clip's first if `time`."""

  time: bool
  dtypes: Mapping[str, Any]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w c"], first: bool
  ) -> Float[Array, "b u h2 w2 c"]:
    """Applies the block.

    Args:
      x: features of even height and width.
      first: whether the first frame of `x` is the first of the clip.
    """
    c = x.shape[-1]
    x = nn.Conv(
      c,
      (3, 3),
      strides=(2, 2),
      padding=((0, 1), (0, 1)),
      **self.dtypes,
      name="resample",
    )(x)
    if not self.time:
      return x
    convolve = TimeConv(c, stride=2, **self.dtypes, name="time_conv")
    past = chunk_causal.past_frames(self, x, 1)
    if first:
      return jnp.concatenate([x[:, :1], convolve(x)], axis=1)
    return convolve(jnp.concatenate([past, x], axis=1))


class Up(nn.Module):
  """Doubles height and width, and frames after the clip's first if `time`.

  Time is upsampled before space: a convolution makes two frames from the
  channels of each frame. It does not see the clip's first frame. The number of
  channels is halved.
  """

  time: bool
  dtypes: Mapping[str, Any]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w c"], first: bool
  ) -> Float[Array, "b u h2 w2 c2"]:
    """Applies the block.

    Args:
      x: features.
      first: whether the first frame of `x` is the first of the clip.
    """
    c = x.shape[-1]
    if self.time:
      alone, x = x[:, : int(first)], x[:, int(first) :]
      past = chunk_causal.past_frames(self, x, 2)
      x = jnp.concatenate([past, x], axis=1)
      x = TimeConv(2 * c, **self.dtypes, name="time_conv")(x)
      x = einops.rearrange(x, "b t h w (r c) -> b (t r) h w c", r=2)
      x = jnp.concatenate([alone, x], axis=1)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return nn.Conv(c // 2, (3, 3), **self.dtypes, name="resample")(x)


class UpBlock(nn.Module):
  """Residual blocks, followed by an `Up` in all levels but the finest.

  Attributes:
    features: channels of the residual blocks.
    blocks: number of residual blocks.
    time: whether the `Up` doubles the frames; None if no `Up` follows.
  """

  features: int
  blocks: int
  time: bool | None
  dtypes: Mapping[str, Any]
  conv3d: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w c"], first: bool
  ) -> Float[Array, "b u h2 w2 f"]:
    """Applies the blocks.

    Args:
      x: features.
      first: whether the first frame of `x` is the first of the clip.
    """
    for j in range(self.blocks):
      x = ResBlock(
        self.features, self.dtypes, self.conv3d, name=f"resnets_{j}"
      )(x)
    if self.time is None:
      return x
    return Up(self.time, self.dtypes, name="upsampler")(x, first)


class Half(nn.Module):
  """The base class of the encoder and the decoder.

  Fields have the meaning of those of `wan_vae.WanVAE`; `channels` is its
  `latent_channels`.
  """

  channels: int
  base_width: int
  multipliers: tuple[int, ...]
  blocks: int
  temporal: tuple[bool, ...]
  conv3d: str | None
  dtypes: Mapping[str, Any]

  def width(self, level: int) -> int:
    """Returns the channels of a level."""
    return self.base_width * self.multipliers[level]

  def conv(self, features: int, name: str) -> nn.Module:
    """Builds a 3x3x3 convolution with `features` output channels."""
    return conv(features, self.conv3d, **self.dtypes, name=name)

  def middle(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Applies the blocks at the coarsest resolution."""
    return MidBlock(self.dtypes, self.conv3d, name="mid_block")(x)

  def head(
    self, x: Float[Array, "b t h w c"], features: int
  ) -> Float[Array, "b t h w f"]:
    """Applies the last norm, activation and convolution."""
    x = UnitNorm(**self.dtypes, name="norm_out")(x)
    return self.conv(features, "conv_out")(nn.silu(x))[0]


class Encoder(Half):
  """Encodes video into features, which `quant_conv` maps to a posterior."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w 3"], first: bool
  ) -> Float[Array, "b tz hz wz c2"]:
    """Applies the encoder.

    Args:
      x: video in [-1, 1]; height and width fill whole latents.
      first: whether the first frame of `x` is the first of the clip.

    Returns:
      Twice as many channels as the latents have.
    """
    x, _ = self.conv(self.base_width, "conv_in")(x)
    block = 0
    for level in range(len(self.multipliers)):
      for _ in range(self.blocks):
        x = ResBlock(
          self.width(level),
          self.dtypes,
          self.conv3d,
          name=f"down_blocks_{block}",
        )(x)
        block += 1
      if level < len(self.temporal):
        x = Down(
          self.temporal[level], self.dtypes, name=f"down_blocks_{block}"
        )(x, first)
        block += 1
    return self.head(self.middle(x), 2 * self.channels)


class Decoder(Half):
  """Decodes the output of `post_quant_conv` into video."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b tz hz wz c"], first: bool
  ) -> Float[Array, "b t h w 3"]:
    """Applies the decoder.

    Args:
      x: latents after `post_quant_conv`.
      first: whether the first frame of `x` is the first of the clip.

    Returns:
      Video, about in [-1, 1] and not clamped.
    """
    coarsest = len(self.multipliers) - 1
    x, _ = self.conv(self.width(coarsest), "conv_in")(x)
    x = self.middle(x)
    for level in range(coarsest, -1, -1):
      x = UpBlock(
        self.width(level),
        self.blocks + 1,
        self.temporal[level - 1] if level else None,
        self.dtypes,
        self.conv3d,
        name=f"up_blocks_{coarsest - level}",
      )(x, first)
    return self.head(x, 3)
