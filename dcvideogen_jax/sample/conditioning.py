"""Encodes the images of image-to-video models, each once.

    encoders = DCVideoGen(loading.image_encoders(source, task="i2v"))
    conditions = encoders.encode_images([{"image": image, "frames": 80}])
    loading.free(encoders.parts)
    parts = loading.load(source, task="i2v", image_encoders=False)
    model = DCVideoGen(parts, conditions=conditions)

So CLIP and the encoder of DC-AE-V go before the transformer comes, which
`DCVideoGen.from_pretrained(encode=...)` does, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.data import clip_images
from dcvideogen_jax.latents import conditions
from dcvideogen_jax.sample import arguments, placement, sizes


class Images(NamedTuple):
  """The images of a video, and how they are encoded.

  Attributes:
    first: first frame; None only if a condition takes its place.
    last: last frame, or None.
    size: of the video.
    tail: "pad" or "official", see `options.VideoOptions.condition_tail`.
  """

  first: arguments.Image | None
  last: arguments.Image | None
  size: sizes.Size
  tail: str = "pad"

  @property
  def given(self) -> list[arguments.Image]:
    """The first image and, where there is one, the last."""
    return [x for x in (self.first, self.last) if x is not None]

  @property
  def key(self) -> tuple[Any, ...]:
    """What the condition depends on, with digests in place of the images."""
    images = [
      (x.shape, hashlib.sha256(x.tobytes()).digest()) for x in self.given
    ]
    return (self.size, self.tail, self.last is None, *images)


class Conditions:
  """Conditions of a pipeline, which are encoded once.

  The last one that was asked for stays on the device, because all seeds of an
  image share it. Those that were encoded beforehand stay on the host.
  """

  def __init__(self) -> None:
    """Begins without any condition."""
    self._last: tuple[Any, Mapping[str, Array]] | None = None
    self._kept: dict[Any, Mapping[str, np.ndarray]] = {}

  def keep(self, pipeline: Any, images: Images, budget: float | None) -> None:
    """Encodes images and keeps the result on the host.

    Args:
      pipeline: `pipeline.DCVideoGen`, with image encoders.
      images: of a video.
      budget: memory for the autoencoder, as for `encode`.
    """
    if images.key not in self._kept:
      found = _encoded(pipeline, images, budget)
      self._kept[images.key] = {
        k: sharding.to_host(x) for k, x in found.items()
      }

  def __call__(
    self, pipeline: Any, images: Images, budget: float | None
  ) -> Mapping[str, Array]:
    """Returns the condition of images, on the device; arguments of `keep`."""
    key = images.key
    if self._last is None or self._last[0] != key:
      # Its memory is free before another one comes.
      self._last = None
      if key in self._kept:
        found = {k: pipeline.put(x) for k, x in self._kept[key].items()}
      else:
        found = _encoded(pipeline, images, budget)
      self._last = key, found
    return self._last[1]


def _encoded(pipeline, images, budget):
  first, last, size, tail = images
  return pipeline.condition(first, last, size, budget, tail)


def encode(
  pipeline: Any, images: Images, budget: float | None
) -> dict[str, Array]:
  """Encodes the images of a video.

  Args:
    pipeline: `pipeline.DCVideoGen`.
    images: with a first image.
    budget: bytes for encoding with DC-AE-V; None is most of the free memory.

  Returns:
    As `pipeline.DCVideoGen.condition`.

  Raises:
    errors.UserError: if the video has too few frames for two images, or if the
      pipeline has no image encoders.
  """
  size = images.size
  shown = [conditions.resize(x, size.height, size.width) for x in images.given]
  found = features(pipeline, shown)
  space = pipeline.parts.space
  _, h, w, _ = pipeline.latent_shape(size)
  grid = (h * space.spatial, w * space.spatial)
  padded = [conditions.pad(x, grid) for x in shown]
  last = padded[1] if len(padded) == 2 else None
  with placement.in_force(pipeline.layout):
    encoded = space.condition(
      padded[0], last, size.frames, pipeline.budget(budget), images.tail
    )
  mask = space.mask(size.frames, last is not None)
  extra = pipeline.put(conditions.extra(mask, encoded))
  return {"image": found, "extra": extra}


def features(
  pipeline: Any, images: Sequence[arguments.Image]
) -> Float[Array, "1 m e"]:
  """Returns CLIP features, of both images if the model tells them apart.

  Args:
    pipeline: `pipeline.DCVideoGen`.
    images: the first and, where there is one, the last, in the video's size.

  Raises:
    errors.UserError: if the pipeline has no CLIP.
  """
  seen = [images[0]]
  if pipeline.parts.transformer.module.image_positions is not None:
    seen = [images[0], images[-1]]
  clip = pipeline.parts.image_encoder
  if clip is None:
    raise errors.UserError(
      "there is no image encoder for an image that was not encoded beforehand,"
      " or not in this size"
    )
  pixels = np.stack(
    [clip_images.preprocess(x, clip.module.image_size) for x in seen]
  )
  with placement.in_force(pipeline.layout):
    found = conditions.encode_images(clip.module, clip.variables, pixels)
  return found.reshape(1, -1, found.shape[-1])
