"""Small pieces shared by the models: normalisation and pixel shuffles.

The channel order inside a shuffle is the reference's (DC-Gen
`dc_videogen/dc_ae_v_ops.py`, commit cae2205): channel first, then the temporal,
the height and the width factor.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over channels, with scale and bias.

  Computed in float32 whatever the input's dtype; returns `dtype`.
  """

  eps: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    c = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (c,), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    scale, bias = (
      jnp.expand_dims(p.astype(jnp.float32), range(x.ndim - 1))
      for p in (scale, bias)
    )
    x = x * scale + bias
    return x.astype(self.dtype)


def shuffle(
  x: Float[Array, "b t h w c"], factor: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 c2"]:
  """Moves channels into frames, rows and columns by `factor` (t, h, w)."""
  ft, fh, fw = factor
  return einops.rearrange(
    x,
    "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c",
    ft=ft,
    fh=fh,
    fw=fw,
  )


def unshuffle(
  x: Float[Array, "b t h w c"], factor: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 c2"]:
  """Moves frames, rows and columns into channels; the inverse of `shuffle`."""
  ft, fh, fw = factor
  return einops.rearrange(
    x,
    "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)",
    ft=ft,
    fh=fh,
    fw=fw,
  )


def average_channels(
  x: Float[Array, "*n c"], features: int
) -> Float[Array, "*n f"]:
  """Means over groups of consecutive channels, down to `features`."""
  x = x.reshape(*x.shape[:-1], features, -1)
  return x.mean(axis=-1, dtype=jnp.float32).astype(x.dtype)


def repeat_channels(
  x: Float[Array, "*n c"], features: int
) -> Float[Array, "*n f"]:
  """Repeats each channel consecutively, up to `features`."""
  return jnp.repeat(x, features // x.shape[-1], axis=-1)
