"""Encoder and decoder of DC-AE-V and their blocks.

Follows DC-Gen `dc_videogen/dc_ae_v.py` (commit cae2205). Modules are named for
loading: `encoder/stages_1/op_list_0/conv1/kernel` is the reference's
`encoder.stages.1.op_list.0.main.conv1.conv.weight`. Stages count from fine to
coarse in both halves; stage 0 is empty in all released variants.

In each block, `conv` holds keyword arguments of `chunk_causal.Conv`. A block
takes and returns features together with a `chunk_causal.Band`, which tells
which rows of the picture the features hold; the band is None for all rows.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import chunk_attention, layers
from dcvideogen_jax.models.chunk_causal import Band, Conv


class ResBlock(nn.Module):
  """A residual block: x + norm(conv(silu(conv(x))))."""

  conv: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"], band: Band | None = None):
    """Applies the block.

    Args:
      x: features.
      band: rows that `x` holds; None for all.

    Returns:
      Features of the shape of `x`, and the rows that they hold: in bands, two
      rows behind `x`.
    """
    c = x.shape[-1]
    y, shortcut = Conv(c, act=nn.silu, **self.conv, name="conv1")(
      x, band, shortcut_delay=2
    )
    band = band and band.delay(1)
    y, _ = Conv(c, use_bias=False, norm=True, **self.conv, name="conv2")(
      y, band
    )
    return shortcut + y, band and band.delay(1)


class Down(nn.Module):
  """Downsampling by a convolution and a pixel-unshuffle.

  Attributes:
    features: output channels.
    factor: input frames, rows and columns per output position.
    shortcut: whether channel means of the unshuffled input are added.
  """

  features: int
  factor: tuple[int, int, int]
  conv: Mapping[str, Any]
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"], band: Band | None = None):
    """Applies the block.

    Args:
      x: features; their frames, rows and columns are multiples of `factor`.
      band: rows that `x` holds; None for all.

    Returns:
      Features at the coarser resolution, and the rows that they hold.
    """
    ft, fh, fw = self.factor
    # `unshuffle` joins groups of fh rows, so the lag must be a multiple of fh.
    delay = 1 if band is None else 1 + (-band.lag - 1) % fh
    y, x = Conv(
      self.features // (ft * fh * fw), delay=delay, **self.conv, name="conv"
    )(x, band, shortcut_delay=delay)
    y = layers.unshuffle(y, self.factor)
    self.sow("intermediates", "main", y)
    if self.shortcut:
      x = layers.average_channels(
        layers.unshuffle(x, self.factor), self.features
      )
      self.sow("intermediates", "shortcut", x)
      y += x
    return y, band and band.delay(delay).scale(down=fh)


class Up(nn.Module):
  """Upsampling by a convolution and a pixel-shuffle.

  Attributes:
    features: output channels.
    factor: output frames, rows and columns per input position.
    shortcut: whether the input, its channels repeated, is shuffled and added.
  """

  features: int
  factor: tuple[int, int, int]
  conv: Mapping[str, Any]
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"], band: Band | None = None):
    """Applies the block.

    Args:
      x: features.
      band: rows that `x` holds; None for all.

    Returns:
      Features at the finer resolution, and the rows that they hold.
    """
    ft, fh, fw = self.factor
    features = self.features * ft * fh * fw
    y, x = Conv(features, **self.conv, name="conv")(x, band)
    y = layers.shuffle(y, self.factor)
    self.sow("intermediates", "main", y)
    if self.shortcut:
      x = layers.shuffle(layers.repeat_channels(x, features), self.factor)
      self.sow("intermediates", "shortcut", x)
      y += x
    return y, band and band.delay(1).scale(up=fh)


class Stage(nn.Module):
  """One stage: optional `Up`, residual blocks, optional `Down` and attention.

  Attributes:
    blocks: residual blocks.
    up: fields of the `Up`; None for a stage without one.
    down: fields of the `Down`; None for a stage without one.
    attention: fields of the `ChunkAttention`; None for a stage without one.
    remat: whether the blocks are rematerialised in the backward pass.
  """

  blocks: int
  conv: Mapping[str, Any]
  up: Mapping[str, Any] | None = None
  down: Mapping[str, Any] | None = None
  attention: Mapping[str, Any] | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b t h w c"], band: Band | None = None):
    """Applies the blocks one after the other.

    Args:
      x: features.
      band: rows that `x` holds; None for all.

    Returns:
      Features after the last block, and the rows that they hold.
    """
    ops = [(ResBlock, {"conv": self.conv})] * self.blocks
    if self.up:
      ops = [(Up, self.up), *ops]
    if self.down:
      ops = [*ops, (Down, self.down)]
    if self.attention:
      ops = [*ops, (chunk_attention.ChunkAttention, self.attention)]
    for j, (op, options) in enumerate(ops):
      if self.remat and band is None:
        op = nn.remat(op)
      x, band = op(**options, name=f"op_list_{j}")(x, band)
    return x, band


class Half(nn.Module):
  """The base class of the encoder and the decoder.

  Fields have the names and the meaning of those of `dc_ae_v.DCAEV`.

  Attributes:
    conv: fields that all convolutions share.
  """

  latent_channels: int
  widths: tuple[int, ...]
  depths: tuple[int, ...]
  chunk_frames: int
  temporal_factor: int
  attention_heads: int
  remat: bool
  conv: Mapping[str, Any]

  def conv_at(self, stage: int) -> dict[str, Any]:
    """Returns the fields of convolutions at the resolution of a stage."""
    coarsest = stage == len(self.widths) - 1
    frames = self.chunk_frames // (self.temporal_factor if coarsest else 1)
    return {**self.conv, "chunk": frames}

  def factor(self, stage: int) -> tuple[int, int, int]:
    """Returns the (t, h, w) reduction from a stage to the next coarser one."""
    if stage == len(self.widths) - 2:
      return (self.temporal_factor, 1, 1)
    return (1, 2, 2)

  def stage(self, stage: int, **fields: Any) -> Stage:
    """Builds stage number `stage`; `fields` are its `up` or `down`."""
    conv = self.conv_at(stage)
    attention = None
    if self.attention_heads and stage == len(self.widths) - 1:
      attention = {"heads": self.attention_heads, **conv}
      del attention["conv3d"]
    return Stage(
      self.depths[stage],
      conv,
      attention=attention,
      remat=self.remat,
      name=f"stages_{stage}",
      **fields,
    )


class Encoder(Half):
  """Encodes video into latents, fine stages first."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t h w c"],
    band: Band | None = None,
    first: int = 0,
    last: int | None = None,
  ):
    """Runs stages `first` to `last`, both included.

    Args:
      x: video in [-1, 1] if `first` is 0, otherwise features of that stage.
      band: rows of the picture that `x` holds; None for all.
      first: first stage; 0 includes the input projection.
      last: last stage; None for the coarsest, which includes the projection to
        latents.

    Returns:
      Features or latents, and the rows that they hold.
    """
    coarsest = len(self.widths) - 1
    last = coarsest if last is None else last
    if first == 0:
      x, band = Down(
        self.widths[1],
        (1, 2, 2),
        self.conv_at(0),
        shortcut=False,
        name="project_in",
      )(x, band)
    for s in range(max(first, 1), last + 1):
      down = s < coarsest and {
        "features": self.widths[s + 1],
        "factor": self.factor(s),
        "conv": self.conv_at(s),
      }
      x, band = self.stage(s, down=down or None)(x, band)
    if last == coarsest:
      x, _ = Conv(
        self.latent_channels, **self.conv_at(coarsest), name="project_out"
      )(x)
    return x, band


class Decoder(Half):
  """Decodes latents into video, coarse stages first."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t h w c"],
    band: Band | None = None,
    first: int | None = None,
    last: int = 0,
  ):
    """Runs stages `first` down to `last`, both included.

    Args:
      x: latents if `first` is the coarsest stage, otherwise features of stage
        `first + 1`.
      band: rows of the picture that `x` holds; None for all.
      first: first stage; None for the coarsest, which includes the input
        projection.
      last: last stage; 0 includes the projection to pixels.

    Returns:
      Features or video, and the rows that they hold.
    """
    coarsest = len(self.widths) - 1
    first = coarsest if first is None else first
    if first == coarsest:
      x, _ = Conv(self.widths[-1], **self.conv_at(coarsest), name="project_in")(
        x
      )
    for s in range(first, max(last, 1) - 1, -1):
      up = s < coarsest and {
        "features": self.widths[s],
        "factor": self.factor(s),
        # The convolution of `Up` runs on the frames of the coarser stage.
        "conv": self.conv_at(s + 1),
      }
      x, band = self.stage(s, up=up or None)(x, band)
    if last == 0:
      x = layers.RMSNorm(
        dtype=self.conv["dtype"],
        param_dtype=self.conv["param_dtype"],
        name="norm_out",
      )(x)
      x, band = Up(
        3, (1, 2, 2), self.conv_at(0), shortcut=False, name="project_out"
      )(nn.silu(x), band)
    return x, band
