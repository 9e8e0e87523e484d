"""The diffusion transformer of Wan 2.1, for any latent space and patch size.

Follows Wan 2.1 `wan/modules/model.py` (commit 9737cba) and diffusers'
`WanTransformer3DModel` (commit 58eb52c). Modules are named for loading: under
`blocks/` every parameter has a leading axis of layers.

In half precision the time embedding, the modulation, the norms, rotary angles
and the softmax stay in float32, as in the reference; the residual stream has
the compute dtype, as in diffusers. Deviations: the timestep may differ from
latent frame to latent frame; the projection of the time embedding is computed
in float32, as in Wan's own code.

With a `chunk`, self-attention is block-causal: a token sees all tokens of its
own chunk of frames and of the chunks before it. A video can then be generated
chunk by chunk: the KV cache of the finished chunks (`kv_cache`) is the `past`
of the chunks after them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.models import fields, layers, rope, wan_blocks, wan_patches
from dcvideogen_jax.ops import attention as attention_ops

# Remat policies: which activations of a block are saved for the backward pass.
REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _block(remat: bool | str | None) -> type[nn.Module]:
  if not remat:
    return wan_blocks.Block
  policy = REMAT["full" if remat is True else remat]
  return nn.remat(wan_blocks.Block, prevent_cse=False, policy=policy)


class Clean(NamedTuple):
  """Copies of the latents with little or no noise, for teacher forcing.

  Attributes:
    latents: the copies, with the mask and condition of the noisy latents.
    timesteps: timesteps of the copies, in the range of `WanDiT`'s.
  """

  latents: Float[Array, "b t h w c"]
  timesteps: Float[Array, " b"] | Float[Array, "b t"]


class WanDiT(nn.Module):
  """Predicts the flow velocity of noisy latents.

  Attributes:
    layers: transformer blocks.
    width: channels of the tokens.
    heads: attention heads.
    ffn_width: hidden channels of the feed-forward.
    in_channels: channels of the latents, with mask and condition for image to
      video.
    out_channels: channels of the prediction.
    patch: latent frames, rows and columns of a token.
    text_width: channels of the text encoder's output.
    image_width: channels of the image features; None for text to video.
    image_positions: image tokens that have learned positions, in Wan's
      first-and-last-frame model; None in the other models.
    frequencies: channels of the sinusoidal time embedding.
    eps: epsilon of the norms inside blocks.
    attention: implementation of `ops.attention`; None lets it choose.
    remat: whether blocks are rematerialised in the backward pass: False or
      None, True, or a key of `REMAT`.
    rope_scale: factors of the positions of frames, rows and columns; (1, 2, 2)
      lets a grid of half the rows and columns span the same range.
    chunk: frames of tokens in a chunk of block-causal attention, the last chunk
      possibly shorter; None, as published, lets every token see every token.
    lora_rank, lora_alpha: rank and scale of low-rank updates of the time
      embedding, self-attention and feed-forward (arXiv 2509.25182); no updates
      if the rank is 0.
    dtype: dtype of the computation; the module's docstring lists the parts that
      are float32.
    param_dtype: dtype of the parameters, except for those of norms, modulation
      and time embedding, which are float32.
    weights: format of the blocks' kernels, see `layers.Dense`.
  """

  layers: int
  width: int
  heads: int
  ffn_width: int
  in_channels: int
  out_channels: int
  patch: tuple[int, int, int] = (1, 2, 2)
  text_width: int = 4096
  image_width: int | None = None
  image_positions: int | None = None
  frequencies: int = 256
  eps: float = 1e-6
  attention: str | None = None
  remat: bool | str | None = False
  rope_scale: tuple[float, float, float] = (1, 1, 1)
  chunk: int | None = None
  lora_rank: int = 0
  lora_alpha: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  weights: str | None = None

  @nn.compact
  def __call__(
    self,
    latents: Float[Array, "b t h w c"],
    timesteps: Float[Array, " b"] | Float[Array, "b t"],
    text: Float[Array, "b s e"],
    image: Float[Array, "b m f"] | None = None,
    clean: Clean | None = None,
    past: Sequence[wan_blocks.KVCache] = (),
  ) -> Float[Array, "b t h w c2"]:
    """Predicts the velocity, noise minus clean latents.

    Args:
      latents: noisy latents; for image to video, the mask and the encoded
        condition are further channels. The sizes are multiples of `patch`.
      timesteps: 0 to 1000, one per sample or one per frame of tokens.
      text: output of the text encoder; all its tokens are attended to.
      image: CLIP features, for models with `image_width` only.
      clean: copies of `latents` for teacher forcing, with the same positions: a
        chunk of `latents` sees itself and the clean copies of the chunks before
        it, a clean chunk sees itself and the clean chunks before it. Needs a
        `chunk`.
      past: `kv_cache` of the chunks before `latents`, in order. Positions count
        from its first frame. When a chunk leaves the window, the chunks after
        it are renumbered, so that positions stay contiguous (arXiv 2309.17453).

    Returns:
      The velocity, `out_channels` channels in the compute dtype.

    Raises:
      ValueError: if shapes do not fit the model, or `clean` is given and the
        model has no `chunk`.
    """
    self._check(latents, timesteps, image)
    if clean is not None:
      self._check(clean.latents, clean.timesteps, image)
      latents, timesteps = _beside(clean, latents, timesteps, self.patch[0])
    dense = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    lora = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
    grid = [n // p for n, p in zip(latents.shape[1:4], self.patch, strict=True)]

    x = self._embed_patches(latents)
    embedding, time = self._embed_time(timesteps, lora)
    text = wan_blocks.MLP(
      self.width, self.width, wan_blocks.gelu_tanh, dense, name="text_embed"
    )(text.astype(self.dtype))
    if image is not None:
      image = wan_blocks.ImageEmbedding(
        self.width, self.image_positions, dense, name="image_embed"
      )(image.astype(self.dtype))
    angles = self._angles(grid, clean, past)

    x, _ = nn.scan(
      _block(self.remat),
      variable_axes={"params": 0, "lora": 0, "intermediates": 0, "cache": 0},
      split_rngs={"params": True},
      in_axes=(*[nn.broadcast] * 4, 0),
      length=self.layers,
    )(
      self.heads,
      self.ffn_width,
      self.eps,
      self.attention,
      self._mask(grid, clean, past),
      {**dense, "weights": self.weights},
      lora,
      name="blocks",
    )(x, time, text, image, angles, tuple(past))
    if clean is not None:
      x, embedding = (y[:, y.shape[1] // 2 :] for y in (x, embedding))
      grid = [grid[0] // 2, *grid[1:]]
    return self._head(x, embedding, grid)

  def _angles(self, grid, clean, past):
    """Returns the angles of the past's tokens, then of this call's."""
    t, *picture = grid
    seen, rest = divmod(sum(p.keys.shape[-3] for p in past), math.prod(picture))
    if rest:
      raise ValueError(
        f"the past has {rest} tokens beyond whole frames of {picture}"
      )
    frames = np.arange(t // 2) if clean is not None else np.arange(seen + t)
    places = (frames, *map(np.arange, picture))
    angles = rope.angles(
      tuple(n * s for n, s in zip(places, self.rope_scale, strict=True)),
      self.width // self.heads,
    )
    return angles if clean is None else jnp.concatenate([angles, angles])

  def _mask(self, grid, clean, past):
    """Returns the mask of the self-attention; None if every token is seen."""
    if self.chunk is None:
      if clean is not None:
        raise ValueError("clean copies need a model with a chunk")
      return None
    tokens, block = math.prod(grid), self.chunk * math.prod(grid[1:])
    if clean is not None:
      return attention_ops.TeacherForcing(block, tokens // 2)
    seen = sum(p.keys.shape[-3] for p in past)
    if tokens <= block and seen % block == 0:
      return None  # The tokens are one chunk, which sees the whole past.
    return attention_ops.BlockCausal(block, seen)

  def _check(self, latents, timesteps, image):
    b, *sizes, c = latents.shape
    if c != self.in_channels:
      raise ValueError(f"expected {self.in_channels} channels, found {c}")
    if any(n % p for n, p in zip(sizes, self.patch, strict=True)):
      raise ValueError(
        f"latents of {sizes} frames, rows and columns are no multiple of the "
        f"patch {self.patch}"
      )
    frames = sizes[0] // self.patch[0]
    if timesteps.shape not in ((b,), (b, frames)):
      raise ValueError(
        f"expected timesteps ({b},) or ({b}, {frames}), found {timesteps.shape}"
      )
    if (image is None) != (self.image_width is None):
      raise ValueError(
        "image features are needed by image-to-video models, and only by them"
      )

  def _embed_patches(self, latents):
    shape = (*self.patch, self.in_channels, self.width)
    kernel, bias = wan_patches.PatchKernel(
      shape, self.param_dtype, name="patch_embed"
    )()
    patches = wan_patches.to_patches(latents.astype(self.dtype), self.patch)
    patches = einops.rearrange(patches, "b t h w p -> b (t h w) p")
    x = layers.linear(patches, kernel.reshape(-1, self.width), bias)
    x = sharding.constrain(x, "batch", "tokens")
    self.sow("intermediates", "patches", x)
    return x

  def _embed_time(self, timesteps, lora):
    """Returns float32 embeddings (b, t, d) and projections (b, t, 6, d)."""
    half = self.frequencies // 2
    frequencies = np.float32(10000.0 ** -(np.arange(half) / half))
    if timesteps.ndim == 1:
      timesteps = timesteps[:, None]
    phase = timesteps.astype(jnp.float32)[..., None] * frequencies[None, None]
    x = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    # By default a GPU rounds the factors to ten bits of mantissa.
    dense = {**lora, "precision": "highest"}
    embedding = wan_blocks.MLP(
      self.width, self.width, nn.silu, dense, name="time_embed"
    )(x)
    time = layers.Dense(
      6 * self.width, param_dtype=self.param_dtype, **dense, name="time_proj"
    )(nn.silu(embedding))
    time = sharding.constrain(time, "batch")
    self.sow("intermediates", "time", time)
    return embedding, einops.rearrange(time, "b t (six d) -> b t six d", six=6)

  def _head(self, x, embedding, grid):
    table = self.param(
      "head_modulation",
      nn.initializers.normal(self.width**-0.5),
      (1, 2, self.width),
      jnp.float32,
    )
    shift, scale = jnp.moveaxis(embedding[:, :, None] + table[:, None], 2, 0)
    x = wan_blocks.modulate(
      layers.LayerNorm(self.eps, use_affine=False)(x), shift, scale
    )
    x = layers.Dense(
      math.prod(self.patch) * self.out_channels,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="head",
    )(x)
    x = sharding.constrain(x, "batch", "tokens")
    x = x.reshape(x.shape[0], *grid, -1)
    return wan_patches.from_patches(x, self.patch)


def _beside(
  clean: Clean, latents: Array, timesteps: Array, patch: int
) -> tuple[Array, Array]:
  """Joins clean copies and latents in time, a timestep per frame of tokens."""
  if clean.latents.shape != latents.shape:
    raise ValueError(
      f"expected clean copies {latents.shape}, found {clean.latents.shape}"
    )
  frames = (latents.shape[0], latents.shape[1] // patch)
  times = [
    jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, frames)
    for t in (clean.timesteps, timesteps)
  ]
  together = jnp.concatenate([clean.latents, latents], axis=1)
  return together, jnp.concatenate(times, axis=1)


def kv_cache(variables: Mapping[str, Any]) -> wan_blocks.KVCache:
  """Returns the KV cache of a call's tokens, for the frames after them.

  Args:
    variables: the variables that `WanDiT.apply` returned beside the prediction,
      with the collection "cache" mutable.
  """
  found = variables["cache"]["blocks"]["self_attn"]
  return wan_blocks.KVCache(
    *(found[name][0] for name in wan_blocks.KVCache._fields)
  )


_COUNTS = ("width", "heads", "ffn_width", "in_channels", "out_channels")
_COUNTS += ("text_width", "frequencies")
# Upper bound of the latent frames, rows or columns of a token.
_MOST_PATCH = 256

_SMALL = {"layers": 30, "width": 1536, "heads": 12, "ffn_width": 8960}
_LARGE = {"layers": 40, "width": 5120, "heads": 40, "ffn_width": 13824}
_WAN = {"in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
_DC = {"in_channels": 32, "out_channels": 32, "patch": (1, 1, 1)}
_IMAGE = {"image_width": 1280}

# Image-to-video models take noisy latents, 4 channels of mask and a condition.
VARIANTS = {
  "wan2.1-t2v-1.3b": _SMALL | _WAN,
  "wan2.1-t2v-14b": _LARGE | _WAN,
  "wan2.1-i2v-14b": _LARGE | _WAN | _IMAGE | {"in_channels": 36},
  "wan2.1-flf2v-14b": _LARGE
  | _WAN
  | _IMAGE
  | {"in_channels": 36, "image_positions": 514},
  "dc-wan2.1-t2v-1.3b": _SMALL | _DC,
  "dc-wan2.1-t2v-14b": _LARGE | _DC,
  "dc-wan2.1-i2v-14b": _LARGE | _DC | _IMAGE | {"in_channels": 68},
}


def build(config: Mapping[str, Any], **overrides: Any) -> WanDiT:
  """Builds the model that a configuration describes.

  Args:
    config: fields of `WanDiT` by name, such as a row of `VARIANTS`.
    **overrides: fields that replace those of `config`.

  Raises:
    ValueError: if a field is unknown, missing or invalid: sizes and patches are
      positive whole numbers, scales finite and positive, the heads divide the
      width, a head has an even width, `remat` is one of `REMAT`.
  """
  module = fields.build(WanDiT, "Wan's transformer", config, overrides)
  _check_fields(module)
  return module


def _check_fields(module: WanDiT) -> None:
  """Raises ValueError if a field is invalid."""
  fields.layers("layers", module.layers)
  for name in _COUNTS:
    fields.count(name, getattr(module, name))
  for name in ("image_width", "image_positions", "chunk"):
    if getattr(module, name) is not None:
      fields.count(name, getattr(module, name))
  if module.frequencies % 2:
    raise ValueError(
      f"frequencies is {module.frequencies}, expected an even number: half are"
      " cosines"
    )
  fields.epsilon("eps", module.eps)
  fields.weights(module.weights)
  for i, n in enumerate(module.patch):
    fields.count(f"patch[{i}]", n, most=_MOST_PATCH)
  for i, scale in enumerate(module.rope_scale):
    fields.positive(f"rope_scale[{i}]", scale)
  if module.remat not in (None, False, True, *REMAT):
    raise ValueError(
      f"remat is True, False or one of {', '.join(REMAT)}, "
      f"found {module.remat!r}"
    )
  if module.width % (2 * module.heads):
    raise ValueError(
      f"width {module.width} is no even multiple of {module.heads} heads"
    )
