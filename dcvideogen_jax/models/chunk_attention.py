"""Streamed attention over time and space for the coarsest stage of DC-AE-V.

No released model has this layer. A position sees all positions of its own chunk
and of the chunk before it, and nothing later. This is the chunk-causal design
of `chunk_causal` with a past of one chunk instead of one frame: the cache holds
the keys and values of one chunk, however long the video is. Keys and values
before the first chunk are zeros, like the frames before a convolution's first.
"""

import functools

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import chunk_causal, layers, rope
from dcvideogen_jax.ops import attention


class ChunkAttention(nn.Module):
  """x + attention(norm(x)); initialised so that it returns x.

  With the `"cache"` collection mutable, the input continues the clip of the
  previous call; see `chunk_causal`.

  Attributes:
    heads: attention heads, which share the channels.
    chunk: frames in a chunk at this layer.
    time: "chunk_causal", or "non_causal", which makes the whole clip one chunk
      without a past.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
  """

  heads: int
  chunk: int
  time: str = "chunk_causal"
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w c"], band: None = None
  ) -> tuple[Float[Array, "b t h w c"], None]:
    """Applies the layer.

    Args:
      x: features; the frames are whole chunks for `time="chunk_causal"`.
      band: always None, because the coarsest stage is computed on all rows.

    Returns:
      Features of the shape of `x`, and None for the band.

    Raises:
      ValueError: if the frames are not whole chunks.
    """
    assert band is None
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dense = functools.partial(layers.Dense, x.shape[-1], **kinds)
    y = layers.RMSNorm(**kinds, name="norm")(x)
    q, k, v = (dense(name=name)(y) for name in "qkv")
    frames = x.shape[1]
    if self.time == "chunk_causal":
      if frames % self.chunk:
        raise ValueError(
          f"{frames} frames are not a multiple of the chunk of {self.chunk}"
        )
      k, v = self._with_past("keys", k), self._with_past("values", v)
      frames = self.chunk
    y = self._attend(q, k, v, frames)
    zeros = nn.initializers.zeros
    y = dense(name="out", kernel_init=zeros)(y.reshape(x.shape))
    return layers.constrain_columns(x + y), None

  def _with_past(self, name, x):
    """Joins each chunk to the previous: (b * chunks, 2 * chunk, h, w, c)."""
    past = chunk_causal.past_frames(self, x, self.chunk, name)
    before = jnp.concatenate([past, x], axis=1)[:, : x.shape[1]]
    split = "b (n t) h w c -> (b n) t h w c"
    parts = [einops.rearrange(y, split, t=self.chunk) for y in (before, x)]
    return jnp.concatenate(parts, axis=1)

  def _attend(self, q, k, v, frames):
    """Attends from the last `frames` frames of each group to all its frames."""
    _, t, h, w, c = k.shape
    places = (np.arange(t), np.arange(h), np.arange(w))
    angles = rope.angles(places, c // self.heads)
    split = "b (n t) h w (k e) -> (b n) (t h w) k e"
    q, k, v = (
      einops.rearrange(x, split, t=size, k=self.heads)
      for x, size in ((q, frames), (k, t), (v, t))
    )
    q = rope.rotate(q, angles[-q.shape[1] :])
    return attention.sharded_attention(q, rope.rotate(k, angles), v, keys=None)
