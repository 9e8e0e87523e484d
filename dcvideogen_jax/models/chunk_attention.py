"""Attention over time and space for the coarsest stage of DC-AE-V, streamed.

An addition that no released model has. A position sees all positions of its
chunk and of the chunk before it, and nothing later: what `chunk_causal` is for
a convolution, with a past of one chunk instead of one frame. So the state is
bounded, two chunks of the coarsest stage, whatever the length of the video.
Before the first chunk lie zeros, as for the convolutions.
"""

import functools

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcvideogen_jax.models import chunk_causal, layers, rope
from dcvideogen_jax.ops import attention


class ChunkAttention(nn.Module):
  """x + attention(norm(x)), which begins as x alone.

  With the "cache" collection mutable the input continues what was seen before;
  see `chunk_causal`.

  Attributes:
    heads: that share the channels.
    chunk: frames in a chunk at this layer.
    time: "chunk_causal", or "non_causal": the whole clip is one chunk, with
      nothing before it.
  """

  heads: int
  chunk: int
  time: str = "chunk_causal"
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t h w c"], band: None = None
  ) -> tuple[Float[Array, "b t h w c"], None]:
    """Bands never come so far: the coarsest stage has all rows."""
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
    """Each chunk with the one before it: (b * chunks, 2 * chunk, h, w, c)."""
    past = chunk_causal.past_frames(self, x, self.chunk, name)
    before = jnp.concatenate([past, x], axis=1)[:, : x.shape[1]]
    split = "b (n t) h w c -> (b n) t h w c"
    parts = [einops.rearrange(y, split, t=self.chunk) for y in (before, x)]
    return jnp.concatenate(parts, axis=1)

  def _attend(self, q, k, v, frames):
    """Queries of the last `frames` of each group of keys."""
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
