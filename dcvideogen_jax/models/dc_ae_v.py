"""DC-AE-V, the chunk-causal deep compression video autoencoder.

Follows DC-Gen `dc_videogen/dc_ae_v.py` (commit cae2205) and arXiv 2509.25182.

Deviations: the temporal design is a field of the module; normalisation is
always computed in float32; frames that do not fill a chunk are padded to one,
where the reference silently changes to another padding in time.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import dc_ae_v_layers, fields, layers, precision
from dcvideogen_jax.models.chunk_causal import FRAMES_KEPT, Band

Video = Float[Array, "b t h w 3"]

_exact = precision.of_float32(precision.CONVOLUTIONS)


class DCAEV(nn.Module):
  """The DC-AE-V autoencoder: video in [-1, 1] to unscaled latents and back.

  Axes `tz hz wz` count latent frames, rows and columns.

  Example:
    module = dc_ae_v.build(dc_ae_v.VARIANTS["f32t4c32"])
    variables = module.init(key, video)
    latents = module.apply(variables, video, method="encode")
    video = module.apply(variables, latents, method="decode")

  Attributes:
    latent_channels: channels of the latents.
    widths: channels of each stage, fine to coarse; the first is unused.
    depths: residual blocks of each stage, fine to coarse; 0 in the first stage,
      1 or more in the others.
    chunk_frames: video frames in a chunk, for `time="chunk_causal"`.
    spatial_factor: pixels per latent in height and in width.
    temporal_factor: frames per latent frame.
    time: "chunk_causal", "causal" or "non_causal"; see `chunk_causal`.
    attention_heads: heads of the `ChunkAttention` at the end of the coarsest
      stage of both halves; 0 builds no attention, as in all released variants.
    latent_scale: factor by which a diffusion model multiplies the latents; not
      applied here.
    remat: whether blocks are rematerialised in the backward pass.
    conv3d: implementation of `ops.conv3d`; with None, `ops.conv3d` chooses.
    dtype: dtype of the computation, except for norms, which run in float32.
    param_dtype: dtype of the parameters.
  """

  latent_channels: int
  widths: tuple[int, ...]
  depths: tuple[int, ...]
  chunk_frames: int = 40
  spatial_factor: int = 32
  temporal_factor: int = 4
  time: str = "chunk_causal"
  attention_heads: int = 0
  latent_scale: float = 1.0
  remat: bool = False
  conv3d: str | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self):
    """Builds the encoder and the decoder."""
    shared = (
      self.latent_channels,
      self.widths,
      self.depths,
      self.chunk_frames,
      self.temporal_factor,
      self.attention_heads,
      self.remat,
      {
        "time": self.time,
        "conv3d": self.conv3d,
        "dtype": self.dtype,
        "param_dtype": self.param_dtype,
      },
    )
    self.encoder = dc_ae_v_layers.Encoder(*shared)
    self.decoder = dc_ae_v_layers.Decoder(*shared)

  @property
  def frames_multiple(self) -> int:
    """Video frames that a clip is padded to a multiple of."""
    if self.time == "chunk_causal":
      return self.chunk_frames
    return self.temporal_factor

  def scale_at(self, stage: int) -> int:
    """Returns the pixels per position, in height or width, at a stage."""
    return min(2**stage, self.spatial_factor)

  def __call__(self, video: Video) -> Float[Array, "b t2 h2 w2 3"]:
    """Encodes clips and decodes their latents.

    Args:
      video: float in [-1, 1]; padded as by `encode`.

    Returns:
      The reconstruction of the padded video, not clamped.
    """
    return self._decode(self._encode(video))

  def encode(self, video: Video) -> Float[Array, "b tz hz wz c"]:
    """Encodes clips.

    Args:
      video: float in [-1, 1]. Frames are padded to a multiple of
        `frames_multiple` by repeating the last one, rows and columns to a
        multiple of `spatial_factor` by repeating the edge.

    Returns:
      Unscaled latents. The frames of the padded video are divided by
      `temporal_factor`, its height and width by `spatial_factor`.
    """
    return layers.constrain_output(self._encode(video))

  def decode(self, latents: Float[Array, "b tz hz wz c"]) -> Video:
    """Decodes latents into clips, without clamping the pixels.

    Args:
      latents: unscaled. Frames are padded to a whole number of chunks by
        repeating the last one, and the surplus video is cut off again.

    Returns:
      Video with `temporal_factor` frames per latent frame. The caller cuts off
      the frames, rows and columns that `encode` padded.
    """
    return layers.constrain_output(self._decode(latents))

  @_exact
  def _encode(self, video):
    video = pad_edge(video, self.frames_multiple, self.spatial_factor)
    return self.encoder(video)[0]

  @_exact
  def _decode(self, latents):
    frames = latents.shape[1] * self.temporal_factor
    latents = pad_edge(latents, self.frames_multiple // self.temporal_factor)
    return self.decoder(latents)[0][:, :frames]

  def encode_image(
    self, image: Float[Array, "b h w 3"]
  ) -> Float[Array, "b 1 hz wz c"]:
    """Encodes images in [-1, 1] to one unscaled latent frame each.

    As in the reference, an image becomes a clip of `temporal_factor` equal
    frames. The clip is too short for a chunk, so that every convolution has
    ordinary zero padding in time.
    """
    video = jnp.repeat(image[:, None], self.temporal_factor, axis=1)
    params = {"params": self.variables["params"]}
    return self.unchunked().apply(params, video, method="encode")

  def decode_image(
    self, latents: Float[Array, "b 1 hz wz c"]
  ) -> Float[Array, "b h w 3"]:
    """Decodes the latents of `encode_image` into images."""
    params = {"params": self.variables["params"]}
    return self.unchunked().apply(params, latents, method="decode")[:, 0]

  def unchunked(self) -> "DCAEV":
    """Returns the same network with ordinary zero padding in time.

    The reference silently changes to this padding when frames do not fill a
    chunk. A causal model keeps its own padding.
    """
    time = "non_causal" if self.time == "chunk_causal" else self.time
    return self.clone(parent=None, time=time)

  @_exact
  def encode_fine(
    self, video: Video, index: Array, height: int, cut: int
  ) -> Float[Array, "b t2 h2 w2 c"]:
    """Runs the stages before `cut` on one band of the rows of a video.

    The bands of a video are passed in order from the top, with the `"rows"`
    collection mutable.

    Args:
      video: rows of the band, float in [-1, 1].
      index: number of the band, from 0.
      height: rows of the whole video, in pixels.
      cut: first stage of the coarse part.

    Returns:
      Features of stage `cut`, `bands.lag` rows behind the band.
    """
    band = Band(index, video.shape[2], 0, height)
    return self.encoder(video, band, last=cut - 1)[0]

  @_exact
  def encode_coarse(
    self, x: Float[Array, "b t h w d"], cut: int
  ) -> Float[Array, "b tz hz wz c"]:
    """Encodes all rows of `encode_fine`'s features with the stages from `cut`.

    Returns the latents.
    """
    return self.encoder(x, first=cut)[0]

  @_exact
  def decode_coarse(
    self, latents: Float[Array, "b tz hz wz c"], cut: int
  ) -> Float[Array, "b t h w d"]:
    """Runs the stages down to `cut` on all rows of unscaled latents."""
    return self.decoder(latents, last=cut)[0]

  @_exact
  def decode_fine(
    self,
    x: Float[Array, "b t h w c"],
    index: Array,
    rows: int,
    height: int,
    cut: int,
  ) -> Float[Array, "b t2 h2 w2 3"]:
    """Runs the stages below `cut` on one band of `decode_coarse`'s features.

    The bands are passed in order from the top, with the `"rows"` collection
    mutable. Bands below the picture then flush the rows in that collection.

    Args:
      x: features with all rows, padded to a multiple of `rows`.
      index: number of the band, from 0.
      rows: rows of a band, at the resolution of stage `cut`.
      height: rows of the whole video, in pixels.
      cut: first stage of the coarse part.

    Returns:
      The band's video, `bands.lag` rows of pixels behind the band.
    """
    x = jax.lax.dynamic_slice_in_dim(x, index * rows, rows, axis=2)
    band = Band(index, rows, 0, height // self.scale_at(cut))
    return self.decoder(x, band, first=cut - 1)[0]


def pad_edge(x: Array, frames: int, size: int = 1) -> Array:
  """Pads a video or latents by repeating the last frame, row and column.

  Args:
    x: axes b t h w c. A numpy array stays in host memory.
    frames: multiple that the frames are padded to.
    size: multiple that the rows and the columns are padded to.
  """
  padding = [
    (0, -n % m) for n, m in zip(x.shape[1:4], (frames, size, size), strict=True)
  ]
  pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
  return pad(x, ((0, 0), *padding, (0, 0)), mode="edge")


_F32 = {
  "widths": (128, 256, 512, 512, 1024, 1024, 1024),
  "depths": (0, 5, 10, 4, 4, 4, 4),
}
_F64 = {
  "widths": (*_F32["widths"], 1024),
  "depths": (*_F32["depths"], 4),
  "spatial_factor": 64,
}

# The released variants. The scale of f64t4c128 equals that of f32t4c256 in the
# reference, which may be a mistake there.
VARIANTS: dict[str, dict[str, Any]] = {
  "f32t4c32": {"latent_channels": 32, "latent_scale": 0.7241, **_F32},
  "f32t4c64": {"latent_channels": 64, "latent_scale": 0.7614, **_F32},
  "f32t4c128": {"latent_channels": 128, "latent_scale": 0.4457, **_F32},
  "f32t4c256": {"latent_channels": 256, "latent_scale": 0.4752, **_F32},
  "f64t4c128": {"latent_channels": 128, "latent_scale": 0.4752, **_F64},
}

# Smaller models, whose decoders are trained to decode the latents of the
# variants (`train.fast_decoder`) at under a fifth of the FLOPs. Nine tenths of
# a decoder's work are in stages 1 to 3; the coarse ones have the variant's
# shapes, so that its weights are a start.
_FAST_WIDTHS = (128, 128, 256, 512, 1024, 1024, 1024)
_FAST_DEPTHS = (0, 2, 4, 2, 2, 4, 4)
FAST: dict[str, dict[str, Any]] = {
  name: {
    **row,
    "widths": _FAST_WIDTHS + row["widths"][len(_FAST_WIDTHS) :],
    "depths": _FAST_DEPTHS + row["depths"][len(_FAST_DEPTHS) :],
  }
  for name, row in VARIANTS.items()
}

# Upper bound of the fields in `_COUNTS`: video frames of a chunk, and pixels or
# frames per latent.
_MOST_FACTOR = 4096
_COUNTS = (
  "chunk_frames",
  "spatial_factor",
  "temporal_factor",
)


def build(config: Mapping[str, Any], **overrides: Any) -> DCAEV:
  """Builds the module that a configuration describes.

  Args:
    config: fields of `DCAEV` by name, such as a row of `VARIANTS`.
    **overrides: fields that replace those of `config`.

  Raises:
    ValueError: if a field is unknown or missing, or the fields do not fit
      together.
  """
  module = fields.build(DCAEV, "DC-AE-V", config, overrides)
  _check(module)
  return module


def _check(m: DCAEV) -> None:
  """Raises ValueError if fields do not fit together."""
  for name in _COUNTS:
    fields.count(name, getattr(m, name), most=_MOST_FACTOR)
  fields.count("latent_channels", m.latent_channels)
  for i, n in enumerate(m.widths):
    fields.count(f"widths[{i}]", n)
  for i, n in enumerate(m.depths[1:], 1):
    # In the reference, a stage without blocks has no resampling.
    fields.layers(f"depths[{i}]", n)
  fields.positive("latent_scale", m.latent_scale)
  stages = len(m.widths)
  if len(m.depths) != stages or stages < 2:
    raise ValueError(
      f"{stages} widths and {len(m.depths)} depths, expected as many of both,"
      " 2 or more"
    )
  if 2 ** (stages - 2) != m.spatial_factor:
    raise ValueError(
      f"{stages} stages halve the picture {stages - 2} times, "
      f"but spatial_factor is {m.spatial_factor}"
    )
  if m.depths[0] != 0:
    raise ValueError(f"depths[0] is {m.depths[0]!r}, expected 0")
  if m.time not in FRAMES_KEPT:
    raise ValueError(f"time is {m.time!r}, expected one of {[*FRAMES_KEPT]}")
  if m.chunk_frames % m.temporal_factor:
    raise ValueError(
      f"chunk_frames is {m.chunk_frames}, "
      f"expected a multiple of temporal_factor {m.temporal_factor}"
    )
  heads = m.attention_heads
  fields.count("attention_heads", heads, least=0)
  if heads and m.widths[-1] % (2 * heads):
    raise ValueError(
      f"{m.widths[-1]} channels are no even multiple of {heads} heads"
    )
  if heads and m.time == "causal":
    raise ValueError("attention needs chunks, which a causal model has none of")
  if m.widths[1] % 4:
    raise ValueError(f"widths[1] is {m.widths[1]}, expected a multiple of 4")
  for s in range(1, stages - 1):
    fine, coarse = m.widths[s : s + 2]
    factor = m.temporal_factor if s == stages - 2 else 4
    if coarse % factor or factor * fine % coarse:
      raise ValueError(
        f"widths {fine} and {coarse} of stages {s} and {s + 1} do not fit: "
        f"{coarse} must divide {factor} * {fine} and be a multiple of {factor}"
      )
