"""Estimates what a video takes, in microseconds: nothing is compiled or traced.

`dcvideogen plan sample` compiles the same programs and counts exactly. Here the
products of the transformer and the convolutions of the autoencoder are counted
by formula, and memory is estimated.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from dcvideogen_jax import memory
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.latents import spaces
from dcvideogen_jax.models import bands, wan_blocks
from dcvideogen_jax.plan import compiled, sampling
from dcvideogen_jax.sample import denoise, loading, sizes

# Activations that a step holds at once, in copies of the tokens (width
# channels) and of the hidden layer of the feed-forward. Steps of 14B compiled
# for GPUs (docs/planning.md) take 0.8 to 1.1 times this.
_WIDE, _HIDDEN = 4.7, 1.25


class Needs(NamedTuple):
  """What a video takes beside the weights.

  Attributes:
    tokens: of the video, in one pass through the transformer.
    step_flops: FLOPs of the matrix products of a solver step.
    step_bytes: estimated memory of a step.
    decode_flops: FLOPs of the convolutions that decode the video; None for
      Wan's autoencoder.
    decode_bytes: least memory in which the video is decoded; None for Wan's
      autoencoder.
    encode_bytes: the same for encoding the condition of image to video; 0 for
      text to video.
  """

  tokens: int
  step_flops: int
  step_bytes: int
  decode_flops: int | None
  decode_bytes: int | None
  encode_bytes: int | None


def needs(
  parts: loading.Parts,
  size: sizes.Size,
  *,
  guided: bool = True,
  platform: str | None = None,
) -> Needs:
  """Estimates what a video takes beside the weights.

  Args:
    parts: a model; its variables may be shapes.
    size: of the video.
    guided: whether classifier-free guidance is used.
    platform: "cpu", "gpu" or "tpu"; None is that of this machine.
  """
  module, space = parts.transformer.module, parts.space
  shape = sampling.latent_shape(parts, size)
  tokens = math.prod(shape[1:-1]) // math.prod(module.patch)
  samples = 2 if guided else 1
  batched = guided and denoise.batched_by_default(module, shape, None)
  at_once = tokens * (samples if batched else 1)
  itemsize = jnp.dtype(parts.dtype).itemsize
  wide = _WIDE * module.width * at_once
  hidden = _HIDDEN * module.ffn_width * min(at_once, wan_blocks.PIECE)
  decoded = to_decode = to_encode = None
  if isinstance(space, spaces.DCAEVLatents):
    decoded, to_decode, to_encode = _autoencoder(parts, size, platform)
  return Needs(
    tokens,
    samples * step_flops(module, tokens, *_context(parts)),
    round(itemsize * (wide + hidden)),
    decoded,
    to_decode,
    to_encode,
  )


def step_flops(module: Any, tokens: int, text: int, image: int = 0) -> int:
  """Returns the FLOPs of the products in one pass of one sample.

  Args:
    module: the transformer.
    tokens: of the video.
    text: tokens of the text.
    image: tokens of CLIP's features; 0 for text to video.
  """
  n, d, f = tokens, module.width, module.ffn_width
  pixels = math.prod(module.patch)
  block = 4 * n * d * d + 2 * n * n * d  # Self-attention.
  block += 2 * n * d * d + 2 * text * d * d + 2 * n * text * d
  block += 2 * image * d * d + 2 * n * image * d
  block += 2 * n * d * f
  ends = n * d * pixels * (module.in_channels + module.out_channels)
  ends += text * d * (module.text_width + d)
  ends += module.frequencies * d + d * d + 6 * d * d
  if image:
    ends += image * module.image_width * (module.image_width + d)
  return 2 * (module.layers * block + ends)


def peak(resident: int, found: Needs) -> int:
  """Returns the least memory of a device that holds some weights, in bytes.

  Args:
    resident: bytes of the weights.
    found: of the video.
  """
  least = max(found.decode_bytes or 0, found.encode_bytes or 0)
  return round(resident + max(found.step_bytes, _planned(least)))


def peak_in_turn(
  weights: Mapping[str, int], halves: tuple[int, int], found: Needs
) -> int:
  """Returns the least memory where encoders go before the other models come.

  Args:
    weights: result of `weights`.
    halves: result of `residency.halves`.
    found: of the video.

  Returns:
    Bytes of a device, as for `--text_encoder=once`.
  """
  encoder, decoder = halves
  images = 0.0
  if "image encoder" in weights:
    images = weights["image encoder"] + encoder + _planned(found.encode_bytes)
  last = weights["transformer"] + decoder
  last += max(found.step_bytes, _planned(found.decode_bytes))
  return round(max(weights["text encoder"], images, last))


def _planned(least: int | None) -> float:
  # The pipeline plans the autoencoder within a share of what is free.
  return (least or 0) / memory.SHARE


def weights(parts: loading.Parts) -> dict[str, int]:
  """Returns the bytes of each part's weights on one device, without texts'."""
  found = {
    "transformer": parts.transformer,
    "image encoder": parts.image_encoder,
    "autoencoder": parts.space,
  }
  if parts.texts is not None and not parts.texts.on_host:
    found["text encoder"] = parts.texts.encoder
  return {k: compiled.size(v.variables) for k, v in found.items() if v}


def _context(parts: loading.Parts) -> tuple[int, int]:
  """Returns the tokens of the text and of the image."""
  text = tokenize.LENGTH if parts.texts is None else parts.texts.length
  if parts.image_encoder is None:
    return text, 0
  clip = parts.image_encoder.module
  images = 1 if parts.transformer.module.image_positions is None else 2
  return text, images * ((clip.image_size // clip.patch) ** 2 + 1)


def _autoencoder(parts, size, platform):
  """Returns the FLOPs of decoding; least memory to decode and to encode."""
  space = parts.space
  frames = space.latent_frames(size.frames) * space.temporal
  options = {
    "streamed": frames > space.module.chunk_frames,
    "platform": platform,
  }
  module = space.decoder(parts.dtype)
  to_decode = bands.least_bytes(module, *size[1:], decode=True, **options)
  to_encode = 0
  if parts.task == "i2v":  # The condition is encoded in float32.
    exact = space.module.clone(dtype=jnp.float32)
    to_encode = bands.least_bytes(exact, *size[1:], decode=False, **options)
  chunks = -(-frames // module.chunk_frames)
  work = chunks * bands.work(module, *size[1:], decode=True)
  return work, to_decode, to_encode
