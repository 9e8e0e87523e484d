"""The vision tower of CLIP, whose ViT-H/14 encodes the images of Wan 2.1.

Follows Wan 2.1 `wan/modules/clip.py` (commit 9737cba), of which DC-VideoGen's
`dc_videogen/wan_blocks/clip.py` (commit cae2205) is a copy, and transformers'
`CLIPVisionModel` (5.23). Under `blocks/` every parameter has a leading axis of
layers. GELU is exact, as in OpenCLIP's ViT-H. OpenAI's own towers use another
GELU and cannot be loaded into this module.

Norms and the softmax are computed in float32. Wan runs the tower under float16
autocast, DC-VideoGen in float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import fields, layers, precision
from dcvideogen_jax.ops import attention


class Attention(nn.Module):
  """Attention among the image's tokens.

  Attributes:
    heads: attention heads.
    attention: implementation of `ops.attention`; None lets it choose.
    dense: fields of the linear maps.
  """

  heads: int
  attention: str | None
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Attends from every token to every token.

    Args:
      x: hidden states.
    """
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
  """Attention and feed-forward, each after a norm and with a residual sum.

  Fields have the meaning of those of `CLIPVision`; `dense` holds the dtypes.
  """

  heads: int
  ffn_width: int
  eps: float
  attention: str | None
  dense: Mapping[str, Any]

  @nn.compact
  def __call__(self, carry: tuple[Array, Array], _):
    """Applies the block in `nn.scan`.

    Args:
      carry: hidden states, and the hidden states before the previous block.
      _: no input is scanned over.

    Returns:
      The new carry, and None as `nn.scan` needs a second result.
    """
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
  """Encodes images into the features that image-to-video models attend to.

  Attributes:
    image_size: height and width of the images in pixels.
    patch: height and width of a token in pixels.
    layers: transformer blocks.
    width: channels of the hidden states.
    heads: attention heads.
    ffn_width: hidden channels of the feed-forward.
    eps: epsilon of the norms.
    attention: implementation of `ops.attention`; None lets it choose.
    remat: whether blocks are rematerialised in the backward pass.
    dtype: dtype of the computation, except for norms and softmax.
    param_dtype: dtype of the parameters.
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
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @precision.of_float32(precision.PRODUCTS)
  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
    """Returns the hidden states of images before the last block.

    The last block is computed too, so that the scan is one loop over one set of
    stacked parameters. It costs 1/layers of the work. Its result is sown as
    "last", the normed class token as "pooled".

    Args:
      images: images from `data.clip_images.preprocess`, `image_size` pixels
        square.

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
    """Embeds the class token and the patches, and adds their positions."""
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
  """Builds the tower that a configuration describes.

  Args:
    config: fields of `CLIPVision` by name, such as a row of `VARIANTS`.
    **overrides: fields that replace those of `config`.

  Raises:
    ValueError: if a field is unknown, missing or invalid.
  """
  module = fields.build(CLIPVision, "CLIP's tower", config, overrides)
  fields.layers("layers", module.layers)
  for name in ("image_size", "patch", "width", "heads", "ffn_width"):
    fields.count(name, getattr(module, name))
  fields.epsilon("eps", module.eps)
  for whole, part in (("width", "heads"), ("image_size", "patch")):
    if getattr(module, whole) % getattr(module, part):
      raise ValueError(
        f"{whole} {getattr(module, whole)} is no multiple of {part} "
        f"{getattr(module, part)}"
      )
  return module
