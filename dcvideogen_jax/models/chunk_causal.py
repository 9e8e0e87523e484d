"""3x3x3 convolution that can be streamed in time and in rows.

Follows DC-Gen `dc_videogen/dc_ae_v_ops.py` (commit cae2205), whose string-keyed
feature cache is Linen's `"cache"` collection here.

Time. The `time` design of a convolution says which frames its three temporal
taps see. Frames before and after the clip are zeros.

- `chunk_causal`: bidirectional inside a chunk and causal across chunks. The
  first frame of a chunk sees the last frame of the previous chunk, and the last
  frame of a chunk sees zeros in place of the next chunk.
- `causal`: each frame and the two frames before it.
- `non_causal`: each frame and one frame on both sides, over the whole clip.

With the `"cache"` collection mutable, the input continues the clip of the
previous call, so that a clip can be passed chunk by chunk. Otherwise the input
is a whole clip.

Rows. With a `Band`, the input is the next band of rows of a picture, passed
from top to bottom. Every convolution keeps its last input rows in the `"rows"`
collection, and its output lags a few rows behind its input. Rows outside the
picture are masked to zero at every layer, as zero padding would have them. The
result therefore equals that of the whole picture, and no row is computed twice.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import layers
from dcvideogen_jax.ops import conv3d

# Temporal design -> input frames that a convolution caches between calls.
FRAMES_KEPT = {"chunk_causal": 1, "causal": 2, "non_causal": 0}


def past_frames(
  module: nn.Module,
  x: Float[Array, "b t h w c"],
  kept: int,
  name: str = "frames",
) -> Float[Array, "b k h w c"]:
  """Returns the `kept` frames before `x`: zeros at the beginning of a clip.

  With the `"cache"` collection mutable, the frames are read from it, and the
  last frames of `x` replace them for the next call.

  Args:
    module: the module that owns the cache variable.
    x: frames of this call.
    kept: number of past frames, `k` in the result.
    name: name of the cache variable.
  """
  b, _, h, w, c = x.shape
  past = jnp.zeros((b, kept, h, w, c), x.dtype)
  if module.is_mutable_collection("cache") and not module.is_initializing():
    state = module.variable("cache", name, lambda: layers.pad_columns(past))
    past = state.value[:, :, :, :w]
    last = jnp.concatenate([past, x], axis=1)[:, -kept:]
    state.value = layers.pad_columns(last)
  return past


@dataclasses.dataclass(frozen=True)
class Band:
  """The rows of a picture that an array holds.

  Attributes:
    index: number of the band, from 0; may be traced.
    rows: rows of a band, at this resolution.
    lag: rows by which the array lags behind; see `start`.
    height: rows of the whole picture, at this resolution.
  """

  index: Array | int
  rows: int
  lag: int
  height: int

  @property
  def start(self) -> Array | int:
    """The row of the picture that is the array's first; may be negative."""
    return self.index * self.rows - self.lag

  def delay(self, rows: int) -> "Band":
    """Returns the band of an array that lags `rows` more rows behind."""
    return dataclasses.replace(self, lag=self.lag + rows)

  def scale(self, up: int = 1, down: int = 1) -> "Band":
    """Returns the same band at a resolution `up` / `down` times as high."""
    assert self.lag * up % down == 0 and self.rows * up % down == 0
    return dataclasses.replace(
      self,
      rows=self.rows * up // down,
      lag=self.lag * up // down,
      height=self.height * up // down,
    )

  def mask(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Sets the rows of `x` that are outside the picture to zero."""
    row = self.start + jnp.arange(x.shape[2])
    inside = (row >= 0) & (row < self.height)
    inside = inside[None, None, :, None, None]
    return jnp.where(inside, x, jnp.zeros((), x.dtype))


class Conv(nn.Module):
  """A 3x3x3 convolution, then optional normalisation and activation.

  Attributes:
    features: output channels.
    chunk: frames in a chunk at this layer, for `time="chunk_causal"`.
    time: temporal design, a key of `FRAMES_KEPT`.
    delay: rows by which the output lags behind the input in bands, 1 or more.
    use_bias: whether the convolution has a bias.
    norm: whether an `RMSNorm` follows.
    act: activation that is applied last.
    conv3d: implementation of `ops.conv3d`; with None, `ops.conv3d` chooses for
      the platform that runs the program.
  """

  features: int
  chunk: int
  time: str = "chunk_causal"
  delay: int = 1
  use_bias: bool = True
  norm: bool = False
  act: Callable[[Array], Array] | None = None
  conv3d: str | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t h w c"],
    band: Band | None = None,
    shortcut_delay: int = 1,
  ) -> tuple[Float[Array, "b t h w f"], Float[Array, "b t h w c"]]:
    """Applies the convolution and delays the input for a shortcut around it.

    Args:
      x: features; the frames are whole chunks for `time="chunk_causal"`.
      band: rows of the picture that `x` holds; None for all rows.
      shortcut_delay: rows by which the shortcut lags behind `x` in bands, at
        most `1 + delay`. The shortcut is read from the rows that the
        convolution keeps for itself.

    Returns:
      The output, in bands `delay` rows behind `x`, and the shortcut, which is
      `x` in the compute dtype.

    Raises:
      ValueError: if the frames are not whole chunks, or a non_causal model is
        streamed in time.
    """
    x = layers.constrain_columns(x.astype(self.dtype))
    shortcut, clips, frames = x, *x.shape[:2]
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (3, 3, 3, x.shape[-1], self.features),
      self.param_dtype,
    ).astype(self.dtype)
    bias = None
    if self.use_bias:
      bias = self.param(
        "bias", nn.initializers.zeros, (self.features,), self.param_dtype
      ).astype(self.dtype)

    x, future = self._with_past(x if band is None else band.mask(x))
    rows = (1, 1)
    if band is not None:
      h = x.shape[2]
      x, rows = self._with_rows(x), (0, 0)
      skip = 1 + self.delay - shortcut_delay
      shortcut = self._without_past(x[:, :, skip : skip + h], frames)
      x = x[:, :, : h + 2]
    w = x.shape[3]
    y = conv3d.conv3d_sharded(
      layers.pad_columns(x),
      kernel,
      bias,
      padding=(future, rows, (1, 1)),
      implementation=self.conv3d,
    )[:, :, :, :w]
    y = layers.constrain_columns(y.reshape(clips, frames, *y.shape[2:]))

    if self.norm:
      y = layers.RMSNorm(
        dtype=self.dtype, param_dtype=self.param_dtype, name="norm"
      )(y)
    return y if self.act is None else self.act(y), shortcut

  def _with_past(self, x):
    """Prepends the past frames; makes each chunk a clip of its own.

    Returns the frames, and the zero frames to pad them with before and after.
    """
    b, t, h, w, c = x.shape
    if self.time == "non_causal":
      if self.is_mutable_collection("cache") and not self.is_initializing():
        raise ValueError("a non_causal model cannot be streamed in time")
      return x, (1, 1)
    past = past_frames(self, x, FRAMES_KEPT[self.time])
    if self.time == "causal":
      return jnp.concatenate([past, x], axis=1), (0, 0)
    if t % self.chunk:
      raise ValueError(
        f"{t} frames are not a multiple of the chunk of {self.chunk}"
      )
    x = x.reshape(b, t // self.chunk, self.chunk, h, w, c)
    past = jnp.concatenate([past[:, None], x[:, :-1, -1:]], axis=1)
    x = jnp.concatenate([past, x], axis=2)
    return x.reshape(-1, self.chunk + 1, h, w, c), (0, 1)

  def _without_past(self, x, frames):
    """Undoes `_with_past`."""
    x = x[:, FRAMES_KEPT[self.time] :]
    return x.reshape(-1, frames, *x.shape[2:])

  def _with_rows(self, x):
    """Prepends the rows above from the row state, and keeps the last rows.

    The state has the channel axis second, as cuDNN's convolution does.
    Otherwise XLA holds the state in both layouts, which takes gigabytes at 4K.
    """
    n, t, _, w, c = x.shape
    kept = 1 + self.delay
    none = jnp.zeros((n, t, kept, w, c), x.dtype)
    state = self.variable(
      "rows", "rows", lambda: jnp.moveaxis(layers.pad_columns(none), -1, 1)
    )
    above = jnp.moveaxis(state.value, 1, -1)[:, :, :, :w]
    x = jnp.concatenate([above, x], axis=2)
    state.value = jnp.moveaxis(layers.pad_columns(x[:, :, -kept:]), -1, 1)
    return x
