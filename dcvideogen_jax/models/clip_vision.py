"""The vision tower of CLIP, whose ViT-H/14 sees the images of Wan 2.1.

Follows Wan 2.1 `wan/modules/clip.py` (commit 9737cba), which DC-VideoGen's
`dc_videogen/wan_blocks/clip.py` (commit cae2205) repeats, and transformers'
`CLIPVisionModel` (5.23). Under `blocks/` every parameter has a leading axis of
layers. GELU is exact, as in OpenCLIP's ViT-H; OpenAI's own towers have another
one and are not for this module.

Norms and the softmax are computed in float32. Wan runs the tower under float16
autocast, DC-VideoGen in float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax.models import fields, layers, precision
from dcvideogen_jax.ops import attention


class Attention(nn.Module):
  """Attention among the image's tokens."""

  heads: int
  attention: str | None
  dense: dict[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    b, n, d = x.shape
    dense = functools.partial(layers.Dense, **self.dense)
    qkv = dense(3 * d, name="qkv")(x)
    q, k, v = (
      part.reshape(b, n, self.heads, d // self.heads)
      for part in jnp.split(qkv, 3, axis=-1)
    )
    x = attention.sharded_attention(
      q, k, v, keys=None, heads=None, implementation=self.attention
    )
    return dense(d, name="o")(x.reshape(b, n, d))


class Block(nn.Module):
  """Attention and feed-forward, each of a normed input and added to it."""

  heads: int
  ffn_width: int
  eps: float
  attention: str | None
  dense: dict[str, Any]

  @nn.compact
  def __call__(self, carry: tuple[Array, Array], _):
    """Carries the hidden states and those before the last block."""
    x, _ = carry
    before = x
    norm = functools.partial(layers.LayerNorm, self.eps, **self.dense)
    dense = functools.partial(layers.Dense, **self.dense)
    x += Attention(self.heads, self.attention, self.dense, name="attn")(
      norm(name="norm1")(x)
    )
    y = dense(self.ffn_width, name="fc1")(norm(name="norm2")(x))
    y = nn.gelu(y, approximate=False)
    x += dense(x.shape[-1], name="fc2")(y)
    self.sow("intermediates", "hidden", x)
    return (x, before), None


class CLIPVision(nn.Module):
  """Turns images into the features that Wan's image-to-video models attend to.

  Attributes:
    image_size: height and width of the images in pixels.
    patch: height and width of a token in pixels.
    layers: blocks.
    width: of the hidden states.
    heads: attention heads.
    ffn_width: hidden width of the feed-forward.
    eps: of the norms.
    attention: an implementation of `ops.attention`; None chooses.
    remat: whether blocks are rematerialised in the backward pass.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  image_size: int
  patch: int
  layers: int
  width: int
  heads: int
  ffn_width: int
  eps: float = 1e-5
  attention: str | None = None
  remat: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @precision.of_float32(precision.PRODUCTS)
  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
    """Features of images: the hidden states before the last block.

    The last block runs too, a 1/layers of the work, so that the scan is one
    loop over one set of stacked parameters. Its result is sown as "last", the
    normed class token as "pooled".

    Args:
      images: what `data.clip_images` makes, `image_size` pixels square.

    Returns:
      (b, 1 + patches, width), the class token first, in the compute dtype.

    Raises:
      ValueError: if the images have another size.
    """
    if images.shape[1:] != (self.image_size, self.image_size, 3):
      raise ValueError(
        f"expected images {self.image_size} pixels square with 3 channels, "
        f"found {images.shape[1:]}"
      )
    dense = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = functools.partial(layers.LayerNorm, self.eps, **dense)
    x = norm(name="pre_norm")(self._embed(images))
    self.sow("intermediates", "embedded", x)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    (x, penultimate), _ = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=self.layers,
    )(
      self.heads,
      self.ffn_width,
      self.eps,
      self.attention,
      dense,
      name="blocks",
    )((x, x), None)
    self.sow("intermediates", "last", x)
    self.sow("intermediates", "pooled", norm(name="post_norm")(x[:, 0]))
    return penultimate

  def _embed(self, images):
    """Class token and patches, with their positions."""
    p, d = self.patch, self.width
    normal = nn.initializers.normal(d**-0.5)
    tokens = 1 + (self.image_size // p) ** 2
    kernel, token, positions = (
      self.param(name, init, shape, self.param_dtype).astype(self.dtype)
      for name, init, shape in (
        (
          "patch_embedding",
          nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
          (p, p, 3, d),
        ),
        ("class_embedding", normal, (d,)),
        ("position_embedding", normal, (tokens, d)),
      )
    )
    patches = einops.rearrange(
      images.astype(self.dtype), "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p
    )
    x = patches @ kernel.reshape(-1, d)
    token = jnp.broadcast_to(token, (x.shape[0], 1, d))
    return jnp.concatenate([token, x], axis=1) + positions[None]


VARIANTS: dict[str, dict[str, Any]] = {
  "vit_h_14": {
    "image_size": 224,
    "patch": 14,
    "layers": 32,
    "width": 1280,
    "heads": 16,
    "ffn_width": 5120,
  },
}


def build(config: Mapping[str, Any], **overrides: Any) -> CLIPVision:
  """A tower from its fields, such as a row of `VARIANTS`.

  Raises:
    ValueError: for an unknown or a missing field, or a value that the tower
      cannot have.
  """
  module = fields.build(CLIPVision, "CLIP's tower", config, overrides)
  fields.layers("layers", module.layers)
  for name in ("image_size", "patch", "width", "heads", "ffn_width"):
    fields.count(name, getattr(module, name))
  fields.positive("eps", module.eps)
  for whole, part in (("width", "heads"), ("image_size", "patch")):
    if getattr(module, whole) % getattr(module, part):
      raise ValueError(
        f"{whole} {getattr(module, whole)} is no multiple of {part} "
        f"{getattr(module, part)}"
      )
  return module
