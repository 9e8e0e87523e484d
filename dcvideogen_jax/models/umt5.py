"""The text encoder of UMT5, whose XXL size encodes the prompts of Wan 2.1.

Follows Wan 2.1 `wan/modules/t5.py` (commit 9737cba) and transformers'
`UMT5EncoderModel` (5.23). Modules have Wan's names; under `blocks/` every
parameter has a leading axis of layers. Each layer has its own table of relative
positions, and attention logits are not divided by sqrt(e).

In bfloat16, norms, logits and softmax are computed in float32. Matrix products,
the nonlinearity and the residual stream have the compute dtype. This includes
the last product of the feed-forward, as in Wan's code; transformers keeps that
kernel (`wo`) in float32 for float16 models only. float16 would need the clamps
of the references and is refused.

In the submodules, `dense` holds keyword arguments of `layers.Dense`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import fields, layers, precision


def relative_buckets(
  distances: np.ndarray, buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
  """Maps distances to rows of the position table, as T5's bidirectional rule.

  Half of the rows are for keys after the query. In each half, the first rows
  are for one distance each, and as many rows are for ranges of distances that
  grow geometrically up to `max_distance`. All larger distances share the last
  row.

  Args:
    distances: whole numbers, position of the key minus position of the query.
    buckets: rows of the table, a multiple of 4.
    max_distance: largest distinguished distance, in tokens.

  Returns:
    int32 rows of the same shape, 0 to `buckets` - 1.
  """
  half = buckets // 2
  single = half // 2
  size = np.abs(distances)
  # In float32, as in the references: rounding decides the edges of the ranges.
  ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(single))
  ratio /= np.float32(np.log(max_distance / single))
  far = single + (ratio * np.float32(half - single)).astype(np.int32)
  near = np.where(size < single, size, np.minimum(far, half - 1))
  return (near + half * (distances > 0)).astype(np.int32)


class Attention(nn.Module):
  """Attention among the text's tokens, biased by relative position.

  Fields have the meaning of those of `UMT5Encoder`.
  """

  heads: int
  head_width: int
  buckets: int
  max_distance: int
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(
    self, x: Float[Array, "b s d"], mask: Array
  ) -> Float[Array, "b s d"]:
    """Attends from every token to the tokens that the mask allows.

    Args:
      x: hidden states.
      mask: (b, s), not 0 where a token may be attended to.
    """
    b, s, d = x.shape
    inner = self.heads * self.head_width
    dense = functools.partial(layers.Dense, use_bias=False, **self.dense)
    # T5 initialises q this small because the logits are not divided by sqrt(e).
    small = nn.initializers.normal((d * self.head_width) ** -0.5)
    split = (b, s, self.heads, self.head_width)
    q = dense(inner, kernel_init=small, name="q")(x).reshape(split)
    k = dense(inner, name="k")(x).reshape(split)
    v = dense(inner, name="v")(x).reshape(split)
    logits = jnp.einsum(
      "bnke,bmke->bknm", q, k, preferred_element_type=jnp.float32
    )
    logits += self._bias(s, d)[None]
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None] != 0, logits, lowest)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    x = jnp.einsum("bknm,bmke->bnke", weights, v)
    return dense(d, name="o")(x.reshape(b, s, inner))

  def _bias(self, s, d):
    """Returns the logits' bias by relative position, float32 (k, s, s)."""
    table = self.param(
      "positions",
      nn.initializers.normal(d**-0.5),
      (self.buckets, self.heads),
      self.dense["param_dtype"],
    )
    distances = np.arange(-s + 1, s)
    rows = relative_buckets(distances, self.buckets, self.max_distance)
    by_distance = table[rows].astype(jnp.float32).T
    position = jnp.arange(s)
    return by_distance[:, position[None] - position[:, None] + s - 1]


class FeedForward(nn.Module):
  """A gated feed-forward: fc2(fc1(x) * gelu(gate(x)))."""

  hidden: int
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """Maps each token.

    Args:
      x: hidden states.
    """
    dense = functools.partial(layers.Dense, use_bias=False, **self.dense)
    gate = layers.gelu(dense(self.hidden, name="gate")(x), approximate=True)
    y = dense(self.hidden, name="fc1")(x) * gate
    return dense(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
  """Attention and feed-forward, each after a norm and with a residual sum.

  Attributes:
    attention: fields of `Attention` other than `dense`.
    ffn_width: hidden channels of the feed-forward.
    norm: fields of the norms.
    dense: fields of all linear maps.
  """

  attention: Mapping[str, Any]
  ffn_width: int
  norm: Mapping[str, Any]
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b s d"], mask: Array):
    """Applies the block.

    Args:
      x: hidden states.
      mask: (b, s), not 0 where a token may be attended to.

    Returns:
      The hidden states, and None as `nn.scan` needs a second result.
    """
    norm = functools.partial(layers.RMSNorm, use_bias=False, **self.norm)
    attention = Attention(**self.attention, dense=self.dense, name="attn")
    x += attention(norm(name="norm1")(x), mask)
    x += FeedForward(self.ffn_width, self.dense, name="ffn")(
      norm(name="norm2")(x)
    )
    self.sow("intermediates", "hidden", x)
    return x, None


class UMT5Encoder(nn.Module):
  """Encodes the tokens of a text.

  Example:
    module = umt5.build(umt5.VARIANTS["umt5_xxl"])
    hidden = module.apply(variables, ids, mask)
    text = umt5.zero_padding(hidden, mask, 512)  # Wan's transformer takes 512.

  Attributes:
    vocab: number of tokens in the vocabulary.
    layers: transformer blocks.
    width: channels of the hidden states.
    heads: attention heads.
    head_width: channels of a head; `heads * head_width` need not be `width`.
    ffn_width: hidden channels of the feed-forward.
    buckets: rows of each table of relative positions, a multiple of 4.
    max_distance: distance in tokens beyond which all share a row of the table.
    eps: epsilon of the norms.
    remat: whether blocks are rematerialised in the backward pass.
    dtype: dtype of the computation; the module's docstring lists the parts that
      are float32.
    param_dtype: dtype of the parameters.
    weights: format of the blocks' kernels, see `layers.Dense`.
  """

  vocab: int
  layers: int
  width: int
  heads: int
  head_width: int
  ffn_width: int
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  remat: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  weights: str | None = None

  @precision.of_float32(precision.PRODUCTS)
  @nn.compact
  def __call__(
    self, ids: Int[Array, "b s"], mask: Int[Array, "b s"]
  ) -> Float[Array, "b s d"]:
    """Encodes token sequences of any length.

    Args:
      ids: token numbers below `vocab`; other numbers give NaN.
      mask: not 0 where a token may be attended to.

    Returns:
      The hidden states after the last norm, in the compute dtype. Those at
      masked positions are meaningless; see `zero_padding`.
    """
    table = self.param(
      "token_embedding",
      nn.initializers.normal(1.0),
      (self.vocab, self.width),
      self.param_dtype,
    )
    x = jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    norm = {
      "eps": self.eps,
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
    }
    x, _ = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.layers,
    )(
      {
        "heads": self.heads,
        "head_width": self.head_width,
        "buckets": self.buckets,
        "max_distance": self.max_distance,
      },
      self.ffn_width,
      norm,
      {
        "dtype": self.dtype,
        "param_dtype": self.param_dtype,
        "weights": self.weights,
      },
      name="blocks",
    )(x, mask)
    return layers.RMSNorm(use_bias=False, **norm, name="norm")(x)


def zero_padding(
  hidden: Float[Array, "b s d"],
  mask: Int[Array, "b s"],
  length: int | None = None,
) -> Float[Array, "b n d"]:
  """Sets masked hidden states to zero, as Wan's transformer expects.

  Args:
    hidden: output of the encoder.
    mask: the mask that the encoder was given.
    length: tokens of the result, `n`; zeros are appended up to this length. As
      padding does not influence the other tokens, short texts can be encoded at
      their own length and padded to Wan's 512 tokens here. None appends
      nothing.

  Raises:
    ValueError: if `hidden` has more than `length` tokens.
  """
  missing = 0 if length is None else length - hidden.shape[1]
  if missing < 0:
    raise ValueError(f"expected {length} tokens or less, found {hidden.shape}")
  hidden = jnp.where(mask[..., None] != 0, hidden, 0)
  return jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))


VARIANTS: dict[str, dict[str, Any]] = {
  "umt5_xxl": {
    "vocab": 256384,
    "layers": 24,
    "width": 4096,
    "heads": 64,
    "head_width": 64,
    "ffn_width": 10240,
  },
}


def build(config: Mapping[str, Any], **overrides: Any) -> UMT5Encoder:
  """Builds the encoder that a configuration describes.

  Args:
    config: fields of `UMT5Encoder` by name, such as a row of `VARIANTS`.
    **overrides: fields that replace those of `config`.

  Raises:
    ValueError: if a field is unknown, missing or invalid.
  """
  module = fields.build(UMT5Encoder, "UMT5", config, overrides)
  fields.layers("layers", module.layers)
  counts = ("vocab", "width", "heads", "head_width", "ffn_width")
  for name in (*counts, "buckets", "max_distance"):
    fields.count(name, getattr(module, name))
  fields.epsilon("eps", module.eps)
  fields.weights(module.weights)
  if module.buckets % 4:
    raise ValueError(
      f"buckets is {module.buckets}, expected a positive multiple of 4"
    )
  if module.max_distance <= module.buckets // 4:
    raise ValueError(
      f"max_distance is {module.max_distance}, expected more than a quarter of "
      f"the {module.buckets} buckets"
    )
  if jnp.dtype(module.dtype) == jnp.float16:
    raise ValueError("UMT5 overflows in float16: expected bfloat16 or float32")
  return module
