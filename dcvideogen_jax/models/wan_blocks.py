"""The parts of `wan_dit`: embeddings, attention, the transformer block.

Follows Wan 2.1 `wan/modules/model.py` (commit 9737cba) and diffusers'
`transformer_wan.py` (commit 58eb52c).

In each module, `dense` holds keyword arguments of `layers.Dense`, `attention`
names an implementation of `ops.attention` (None lets it choose), and `eps` is
that of the norms. The video's tokens are in t h w order.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import layers, rope
from dcvideogen_jax.ops import attention

Mask = attention.Mask
# The text embedder and the feed-forward use tanh GELU, the image embedder uses
# exact GELU.
gelu_tanh = functools.partial(layers.gelu, approximate=True)
# Tokens that a feed-forward maps at once, enough to fill a GPU. A video of
# 2160x3840 has five times as many, whose hidden channels would take more memory
# than attention.
PIECE = 32768


class MLP(nn.Module):
  """Two linear maps around a nonlinearity.

  More than `PIECE` tokens are mapped in equal pieces, which gives the same
  result with less memory.

  Attributes:
    hidden: channels between the two.
    features: output channels.
    act: the nonlinearity.
    dense: fields of the linear maps.
    tokens: logical axis of the tokens, for sharding; None replicates them.
  """

  hidden: int
  features: int
  act: Any
  dense: Mapping[str, Any]
  tokens: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
    """Maps each token.

    Args:
      x: tokens, or frames in the time embedding.
    """
    both = _Both(
      layers.Dense(self.hidden, **self.dense, name="linear_1"),
      layers.Dense(self.features, **self.dense, name="linear_2"),
      self.act,
      self.tokens,
    )
    pieces = 1 if self.is_initializing() else self._pieces(x.shape[1])
    if pieces == 1:
      return both(x)
    apply = nn.scan(
      lambda module, _, piece: (None, module(piece)),
      variable_broadcast=("params", "lora"),
      split_rngs={"params": False},
      in_axes=1,
      out_axes=1,
    )
    _, x = apply(
      both, None, einops.rearrange(x, "b (p n) c -> b p n c", p=pieces)
    )
    return einops.rearrange(x, "b p n c -> b (p n) c")

  def _pieces(self, tokens: int) -> int:
    """Returns how many pieces of the tokens are mapped one after the other."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and sharding.num_shards(mesh, self.tokens) > 1:
      return 1  # Each device has a piece already.
    least = -(-tokens // PIECE)
    return next((n for n in range(least, 2 * least) if tokens % n == 0), 1)


class _Both(nn.Module):
  """The maps of an `MLP` and the nonlinearity between them."""

  first: nn.Module
  second: nn.Module
  act: Any
  tokens: str | None

  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
    x = self.act(self.first(x))
    x = self.second(sharding.constrain(x, "batch", self.tokens, "hidden"))
    return sharding.constrain(x, "batch", self.tokens)


class ImageEmbedding(nn.Module):
  """Maps CLIP features to tokens of the transformer's width.

  Attributes:
    width: channels of the tokens.
    positions: image tokens with learned positions; None adds no positions.
    dense: fields of the linear maps.
  """

  width: int
  positions: int | None
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b m e"]) -> Float[Array, "b m d"]:
    """Maps each image token.

    Args:
      x: CLIP features, `m` image tokens.
    """
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
  """Splits features into heads; `tokens` is the logical axis of the tokens."""
  x = sharding.constrain(x, "batch", tokens, "hidden")
  return einops.rearrange(x, "b n (k e) -> b n k e", k=heads)


def _features(x: Float[Array, "b n k e"]) -> Float[Array, "b n d"]:
  """Joins the heads of the video's tokens into features."""
  x = einops.rearrange(x, "b n k e -> b n (k e)")
  return sharding.constrain(x, "batch", "tokens", "hidden")


class KVCache(NamedTuple):
  """Keys and values of earlier tokens, for later tokens to attend to.

  On a mesh, every device holds all tokens of some heads.

  Attributes:
    keys: keys before the rotary embedding, so that positions are chosen when
      the cache is used.
    values: values of the same tokens.
  """

  keys: Float[Array, "*layers b m k e"]
  values: Float[Array, "*layers b m k e"]


class SelfAttention(nn.Module):
  """Attention among the video's tokens, with rotary positions.

  With the collection "cache" mutable, the keys and values of the tokens are
  stored there as "keys" and "values".

  Attributes:
    heads: attention heads.
    mask: which keys a query sees, those of the past included; None for all.
  """

  heads: int
  eps: float
  attention: str | None
  mask: Mask | None
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    angles: Float[Array, "keys pairs"],
    past: Sequence[KVCache] = (),
  ) -> Float[Array, "b n d"]:
    """Attends from the tokens to the past and to each other.

    Args:
      x: tokens of the video.
      angles: rotary angles of the tokens of `past`, in order, then of `x`.
      past: KV caches of earlier tokens, in order, without an axis of layers.
    """
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
  """Attention to the text plus, for image to video, attention to the image."""

  heads: int
  eps: float
  attention: str | None
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    text: Float[Array, "b s d"],
    image: Float[Array, "b m d"] | None,
  ) -> Float[Array, "b n d"]:
    """Attends from the video's tokens to the text's and the image's.

    Args:
      x: tokens of the video.
      text: embedded text; all tokens are attended to.
      image: embedded CLIP features; None for text to video.
    """
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
  """Self-attention, cross-attention and feed-forward, modulated by time.

  Attributes:
    heads: attention heads.
    ffn_width: hidden channels of the feed-forward.
    mask: which keys a query of the self-attention sees; None for all.
    lora: LoRA fields of `layers.Dense` in self-attention and feed-forward.
  """

  heads: int
  ffn_width: int
  eps: float
  attention: str | None
  mask: Mask | None
  dense: Mapping[str, Any]
  lora: Mapping[str, Any]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    time: Float[Array, "b t 6 d"],
    text: Float[Array, "b s d"],
    image: Float[Array, "b m d"] | None,
    angles: Float[Array, "keys pairs"],
    past: Sequence[KVCache] = (),
  ):
    """Applies the block.

    Args:
      x: tokens of the video.
      time: projected time embedding: shift, scale and gate of self-attention,
        then of the feed-forward; `t` is 1 or the frames of tokens.
      text: embedded text.
      image: embedded CLIP features; None for text to video.
      angles: rotary angles of the tokens of `past`, in order, then of `x`.
      past: this layer's KV caches of earlier tokens, in order.

    Returns:
      The tokens, and None as `nn.scan` needs a second result.
    """
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
  """Computes x * (1 + scale) + shift; `t` is 1 or the frames of tokens.

  Args:
    x: tokens of the video.
    shift: added to the tokens of each frame.
    scale: added to 1 as the factor of the tokens of each frame.
  """
  grouped = x.reshape(*shift.shape[:2], -1, x.shape[-1])
  return (grouped * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(
    x.shape
  )


def gated(
  x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Array
) -> Float[Array, "b n d"]:
  """Computes x + gate * y in float32; returns the dtype of `x`.

  Args:
    x: the residual stream.
    y: output of a sublayer.
    gate: (b, t, d), where `t` is 1 or the frames of tokens.
  """
  grouped = y.astype(jnp.float32).reshape(*gate.shape[:2], -1, y.shape[-1])
  y = (grouped * gate[:, :, None]).reshape(y.shape)
  return (x.astype(jnp.float32) + y).astype(x.dtype)
