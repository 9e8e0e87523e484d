"""The parts of `wan_dit`: embeddings, attention, the transformer block.

Follows Wan 2.1 `wan/modules/model.py` (commit 9737cba) and diffusers'
`transformer_wan.py` (commit 58eb52c).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax import sharding
from dcvideogen_jax.models import layers, rope
from dcvideogen_jax.ops import attention

Mask = attention.Mask
# In the text embedder and the feed-forward; the image embedder has exact GELU.
gelu_tanh = functools.partial(layers.gelu, approximate=True)


class MLP(nn.Module):
  """Two linear maps around a nonlinearity; `tokens` is the logical axis `n`."""

  hidden: int
  features: int
  act: Any
  dense: dict[str, Any]
  tokens: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
    x = layers.Dense(self.hidden, **self.dense, name="linear_1")(x)
    x = sharding.constrain(self.act(x), "batch", self.tokens, "hidden")
    x = layers.Dense(self.features, **self.dense, name="linear_2")(x)
    return sharding.constrain(x, "batch", self.tokens)


class ImageEmbedding(nn.Module):
  """CLIP features to tokens of the transformer's width."""

  width: int
  positions: int | None
  dense: dict[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b m e"]) -> Float[Array, "b m d"]:
    if self.positions is not None:
      shape = (1, self.positions, x.shape[-1])
      x += self.param(
        "positions", nn.initializers.zeros, shape, self.dense["param_dtype"]
      )
    dtype = self.dense["dtype"]
    x = layers.LayerNorm(dtype=dtype, name="norm1")(x)
    features = x.shape[-1]
    x = layers.Dense(features, **self.dense, name="linear_1")(x)
    x = sharding.constrain(
      layers.gelu(x, approximate=False), "batch", None, "hidden"
    )
    x = layers.Dense(self.width, **self.dense, name="linear_2")(x)
    x = layers.LayerNorm(dtype=dtype, name="norm2")(x)
    return sharding.constrain(x, "batch")


def _heads(
  x: Float[Array, "b n d"], heads: int, tokens: str | None
) -> Float[Array, "b n k e"]:
  """Splits features into heads."""
  x = sharding.constrain(x, "batch", tokens, "hidden")
  return einops.rearrange(x, "b n (k e) -> b n k e", k=heads)


def _features(x: Float[Array, "b n k e"]) -> Float[Array, "b n d"]:
  """Puts the heads of the video's tokens together."""
  x = einops.rearrange(x, "b n k e -> b n (k e)")
  return sharding.constrain(x, "batch", "tokens", "hidden")


class KVCache(NamedTuple):
  """What later tokens need of earlier ones, by layer.

  On a mesh every device has all tokens of some heads.

  Attributes:
    keys: before their rotation, so that positions can still be chosen.
    values: of the same tokens.
  """

  keys: Float[Array, "*layers b m k e"]
  values: Float[Array, "*layers b m k e"]


class SelfAttention(nn.Module):
  """Attention among the video's tokens, with rotary positions.

  With the collection "cache" mutable, the tokens' own keys and values are left
  in it as "keys" and "values".
  """

  heads: int
  eps: float
  attention: str | None
  mask: Mask | None
  dense: dict[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    angles: rope.Angles,
    past: Sequence[KVCache] = (),
  ) -> Float[Array, "b n d"]:
    """Angles are of the past's tokens, in order, and then of the own ones."""
    n, d = x.shape[1:]
    dense = functools.partial(layers.Dense, d, **self.dense)
    norm = functools.partial(
      layers.RMSNorm, self.eps, use_bias=False, dtype=self.dense["dtype"]
    )
    q = norm(name="norm_q")(dense(name="q")(x))
    k = norm(name="norm_k")(dense(name="k")(x))
    v = dense(name="v")(x)
    q, k, v = (_heads(y, self.heads, "tokens") for y in (q, k, v))
    if not self.is_initializing():
      self.sow("cache", "keys", k)
      self.sow("cache", "values", v)
    before = None
    if past:
      keys, values = (jnp.concatenate(x, 1) for x in zip(*past, strict=True))
      before = rope.rotate(keys, angles[:-n]), values
    y = attention.sharded_attention(
      rope.rotate(q, angles[-n:]),
      rope.rotate(k, angles[-n:]),
      v,
      keys="tokens",
      past=before,
      mask=self.mask,
      implementation=self.attention,
    )
    return dense(name="o")(_features(y))


class CrossAttention(nn.Module):
  """Attention to the text and, apart from it, to the image."""

  heads: int
  eps: float
  attention: str | None
  dense: dict[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    text: Float[Array, "b s d"],
    image: Float[Array, "b m d"] | None,
  ) -> Float[Array, "b n d"]:
    d = x.shape[-1]
    dense = functools.partial(layers.Dense, d, **self.dense)
    norm = functools.partial(
      layers.RMSNorm, self.eps, use_bias=False, dtype=self.dense["dtype"]
    )
    split = functools.partial(_heads, heads=self.heads, tokens=None)
    attend = functools.partial(
      attention.sharded_attention, keys=None, implementation=self.attention
    )
    q = _heads(norm(name="norm_q")(dense(name="q")(x)), self.heads, "tokens")
    y = attend(
      q,
      split(norm(name="norm_k")(dense(name="k")(text))),
      split(dense(name="v")(text)),
    )
    if image is not None:
      y += attend(
        q,
        split(norm(name="norm_k_img")(dense(name="k_img")(image))),
        split(dense(name="v_img")(image)),
      )
    return dense(name="o")(_features(y))


class Block(nn.Module):
  """Self-attention, cross-attention and feed-forward, modulated by time."""

  heads: int
  ffn_width: int
  eps: float
  attention: str | None
  mask: Mask | None
  dense: dict[str, Any]
  lora: dict[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b t 6 d"],
    text: Float[Array, "b s d"],
    image: Float[Array, "b m d"] | None,
    angles: rope.Angles,
    past: Sequence[KVCache] = (),
  ):
    d, dtype = x.shape[-1], x.dtype
    x = sharding.constrain(x, "batch", "tokens")
    table = self.param(
      "modulation", nn.initializers.normal(d**-0.5), (1, 6, d), jnp.float32
    )
    time = time + table[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(time, 2, 0)
    norm = functools.partial(layers.LayerNorm, self.eps)
    attend = {"heads": self.heads, "eps": self.eps, "attention": self.attention}

    with jax.named_scope("self_attn"):
      y = modulate(norm(use_affine=False)(x), shift1, scale1).astype(dtype)
      y = SelfAttention(
        **attend,
        mask=self.mask,
        dense={**self.dense, **self.lora},
        name="self_attn",
      )(y, angles, past)
      self.sow("intermediates", "self_attn_out", y)
      x = sharding.constrain(gated(x, y, gate1), "batch", "tokens")

    with jax.named_scope("cross_attn"):
      y = norm(dtype=dtype, name="norm3")(x)
      y = CrossAttention(**attend, dense=self.dense, name="cross_attn")(
        y, text, image
      )
      self.sow("intermediates", "cross_attn_out", y)
      x = sharding.constrain(x + y, "batch", "tokens")

    with jax.named_scope("ffn"):
      y = modulate(norm(use_affine=False)(x), shift2, scale2).astype(dtype)
      y = MLP(
        self.ffn_width,
        d,
        gelu_tanh,
        {**self.dense, **self.lora},
        "tokens",
        name="ffn",
      )(y)
      self.sow("intermediates", "ffn_out", y)
      x = sharding.constrain(gated(x, y, gate2), "batch", "tokens")
    self.sow("intermediates", "out", x)
    return x, None


def modulate(
  x: Float[Array, "b n d"],
  shift: Float[Array, "b t d"],
  scale: Float[Array, "b t d"],
) -> Float[Array, "b n d"]:
  """x * (1 + scale) + shift; `t` is 1 or the latent frames of the tokens."""
  grouped = x.reshape(*shift.shape[:2], -1, x.shape[-1])
  return (grouped * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(
    x.shape
  )


def gated(
  x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Array
) -> Float[Array, "b n d"]:
  """x + gate * y, computed in float32; `gate` as in `modulate`."""
  grouped = y.astype(jnp.float32).reshape(*gate.shape[:2], -1, y.shape[-1])
  y = (grouped * gate[:, :, None]).reshape(y.shape)
  return (x.astype(jnp.float32) + y).astype(x.dtype)


def to_patches(
  latents: Float[Array, "b t h w c"], patch: Sequence[int]
) -> Float[Array, "b t2 h2 w2 p"]:
  """Patches of frames, rows and columns, each one vector, channels last."""
  pt, ph, pw = patch
  return einops.rearrange(
    latents,
    "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)",
    pt=pt,
    ph=ph,
    pw=pw,
  )


def from_patches(
  patches: Float[Array, "b t h w p"], patch: Sequence[int]
) -> Float[Array, "b t2 h2 w2 c"]:
  """The inverse of `to_patches`."""
  pt, ph, pw = patch
  return einops.rearrange(
    patches,
    "b t h w (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
    pt=pt,
    ph=ph,
    pw=pw,
  )


class PatchKernel(nn.Module):
  """The parameters of a convolution whose stride is its kernel."""

  shape: tuple[int, ...]
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self):
    init = nn.initializers.xavier_uniform(in_axis=(0, 1, 2, 3))
    kernel = self.param("kernel", init, self.shape, self.param_dtype)
    zeros = nn.initializers.zeros
    return kernel, self.param("bias", zeros, self.shape[-1:], self.param_dtype)
