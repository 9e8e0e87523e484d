"""How a stream is made: chunk after chunk, each of which leaves what is kept.

Each chunk of latents is denoised while it sees keys and values of the clean
chunks before it; one pass through the model then leaves its own. With a window
the oldest chunks are forgotten, but for the first few (arXiv 2309.17453), and
memory no longer grows.

Positions are those within what a chunk sees: of the frames that are kept the
first has position 0, whatever was forgotten between them, and the new chunk
comes last. Until something is forgotten they are the true ones. After that they
never exceed those of `sink + window + 1` chunks, which a model ought to have
been trained on; true positions would soon be ones that it never saw.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.latents import conditions, denoiser, videos
from dcvideogen_jax.models import pieces, wan_blocks
from dcvideogen_jax.sample import (
  denoise,
  generation,
  loading,
  options,
  placement,
  sizes,
)

Latents = Float[Array, "b t h w c"]

# Comes before its number for the noise that a finished chunk is looked at with;
# there is no such chunk.
CLEAN = 2**32 - 1


class KVCache:
  """What the chunks that are still seen left, by pass through the model."""

  def __init__(self, passes: int, sink: int, window: int | None):
    """Keeps nothing yet.

    Args:
      passes: through the model for each step.
      sink: chunks at the beginning that stay.
      window: chunks at the end that stay; None is all.
    """
    self._chunks: list[Sequence[wan_blocks.KVCache]] = []
    self._passes = passes
    self._sink = sink
    self._window = window

  def add(self, chunk: Sequence[wan_blocks.KVCache]) -> None:
    """Keeps a chunk's keys and values of each pass; forgets the oldest."""
    self._chunks.append(chunk)
    if self._window is not None:
      beyond = len(self._chunks) - self._sink - self._window
      del self._chunks[self._sink : self._sink + max(0, beyond)]

  def by_pass(self) -> denoiser.Caches:
    """In the order in which the chunks were added."""
    return tuple(
      tuple(chunk[i] for chunk in self._chunks) for i in range(self._passes)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """A video that is made while one looks at it; each iteration makes it anew.

  Attributes:
    size: of the video, with the frames that were given.
    settings: what is done, ready for JSON.
    pipeline: `pipeline.DCVideoGen`.
    transformer: in chunks.
    asked: all options.
    how: each chunk is denoised.
    shape: of a chunk's latents without samples.
    counts: of the chunks that are given and those that are made.
    given: frames to go on from.
    first: frame, for image to video.
    texts, negative: embeddings, those of the prompts by the first chunk made.
    seeds: of the samples.
  """

  size: sizes.Size
  settings: Mapping[str, Any]
  pipeline: Any
  transformer: loading.LoadedModel
  asked: options.StreamOptions
  how: denoise.Denoising
  shape: tuple[int, int, int, int]
  counts: tuple[int, int]
  given: np.ndarray | None
  first: np.ndarray | None
  texts: Mapping[int, Array]
  negative: Array | None
  seeds: Sequence[int]

  def latents(self) -> Iterator[Latents]:
    """Latents chunk by chunk, float32, those of given frames first.

    The last chunk is a whole one too.
    """
    known, count = self.counts
    cache = KVCache(self._passes, self.asked.sink, self.asked.window)
    images = self._images()
    for i, x in enumerate(self._known()):
      yield x
      cache.add(self._cached(x, self._inputs(0, next(images)), cache, i))
    for n in range(count):
      inputs = self._inputs(n, next(images))
      x = self._denoise(n, inputs, cache)
      yield x
      if n + 1 < count:
        cache.add(self._cached(x, inputs, cache, known + n))

  def chunks(
    self, sample: int | None = None
  ) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    """Decoded frames as they are made; of all samples, or of one.

    Raises:
      errors.UserError: if there is no such sample.
    """
    b, space = len(self.seeds), self.pipeline.parts.space
    if sample is not None and not 0 <= sample < b:
      raise errors.UserError(f"there are {b} samples, found number {sample}")
    some = slice(None) if sample is None else slice(sample, sample + 1)
    grid = (b, *self.shape[1:3])
    limits = self.pipeline.parts.dtype, self._budget()
    with placement.in_force(self.pipeline.layout):
      video = space.decode_stream(self.latents(), grid, self.size, *limits)
    for chunk in self.pipeline.each(video, self.asked.phase, "decode"):
      yield chunk[some]

  def __iter__(self) -> Iterator[UInt8[np.ndarray, "b t h w 3"]]:
    return self.chunks()

  def save(
    self, path: str | os.PathLike[str], sample: int = 0, **options: Any
  ) -> None:
    """Writes one sample as an mp4; as `generation.Generation.save`."""
    generation.save(self.chunks(sample), path, **options)

  @property
  def _passes(self) -> int:
    """Through the model for each step."""
    return 1 if self.negative is None or self.how.batched else 2

  def _denoise(self, n, inputs, cache):
    def on_step(i, x):
      if self.asked.on_step is not None:
        self.asked.on_step(n * self.how.plan.steps + i, x)

    return denoise.run(
      self.pipeline,
      self.transformer,
      self.how,
      self.pipeline.put(denoiser.noise(self.seeds, self.shape, n)),
      *inputs,
      phase=self.asked.phase,
      on_step=on_step,
      caches=cache.by_pass(),
    )

  def _cached(self, x, inputs, cache, i):
    """Keys and values of finished chunk `i` of all, by pass."""
    (module, variables), level = self.transformer, self.asked.clean_level
    if level:
      other = denoiser.noise(self.seeds, self.shape, CLEAN, i)
      x = flow.add_noise(x, self.pipeline.put(other), level)
    time = np.float32(level * flow.TRAIN_STEPS)
    t = self.pipeline.put(np.full(len(self.seeds), time))
    args = (x, t, variables, *inputs, cache.by_pass())
    with self.asked.phase("compile"), placement.in_force(self.pipeline.layout):
      function = denoise.jit_cache(module, self.how.batched)
      program = function.lower(*args).compile()
    with self.asked.phase("denoise"):
      return jax.block_until_ready(program(*args))

  def _inputs(self, n, image):
    """What both branches of the guidance get for made chunk `n`."""
    text = self.texts[max(number for number in self.texts if number <= n)]
    if self.negative is None:
      return {"text": text, **image}, None
    return {"text": text, **image}, {"text": self.negative, **image}

  def _images(self) -> Iterator[dict[str, Array]]:
    """What image-to-video models get of each chunk."""
    if self.first is None:
      yield from itertools.repeat({})
    b, (t, h, w, _) = len(self.seeds), self.shape
    image = conditions.resize(self.first, *self.size[1:])
    with self.asked.phase("condition"):
      features = self.pipeline.put(
        np.repeat(self.pipeline.features([image]), b, 0)
      )
    space = self.pipeline.parts.space
    grid = (h * space.spatial, w * space.spatial)
    video = videos.condition_video(
      conditions.pad(image, grid)[None],
      sum(self.counts) * t * space.temporal,
      space.temporal,
    )
    encoded = space.encode_stream(video, *grid, self._budget())
    encoded = self.pipeline.each(encoded, self.asked.phase, "condition")
    mask = space.mask(t * space.temporal, False)
    for x, _ in pieces.regroup(encoded, t, eager=True):
      extra = np.repeat(conditions.extra(mask, x), b, axis=0)
      yield {"image": features, "extra": self.pipeline.put(extra)}
      mask = np.zeros_like(mask)

  def _known(self) -> Iterator[Latents]:
    """Latents of the given frames, chunk by chunk."""
    if self.given is None:
      return
    t, h, w, _ = self.shape
    space = self.pipeline.parts.space
    grid = (h * space.spatial, w * space.spatial)
    step = t * space.temporal
    chunks = (
      np.stack([conditions.pad(x, grid) for x in self.given[i : i + step]])
      for i in range(0, len(self.given), step)
    )
    encoded = space.encode_stream(
      (x[None] for x in chunks), *grid, self._budget()
    )
    encoded = self.pipeline.each(encoded, self.asked.phase, "condition")
    for x, _ in pieces.regroup(encoded, t, eager=True):
      yield self.pipeline.put(np.repeat(x, len(self.seeds), axis=0))

  def _budget(self) -> float:
    """Bytes of a device for the autoencoder, beside keys and values to come.

    Raises:
      errors.UserError: if these alone do not fit.
    """
    free: float = self.pipeline.budget(self.asked.memory_budget)
    if self.asked.memory_budget is not None:
      return free
    module = self.transformer.module
    sink, window = self.asked.sink, self.asked.window
    chunks = sum(self.counts) - 1
    if window is not None:
      # A new one is there before the oldest is forgotten.
      chunks = min(chunks, sink + window + 1)
    passes = self._passes
    branches = 1 if self.negative is None else 2
    tokens = math.prod(self.shape[:3]) // math.prod(module.patch)
    shape = (
      module.layers,
      len(self.seeds) * branches // passes,
      tokens,
      module.heads,
      module.width // module.heads,
    )
    if self.pipeline.layout is not None:
      mesh = self.pipeline.layout.mesh
      spec = denoiser.cache_spec(mesh, shape)
      shape = jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)
    kept = 2 * chunks * passes * math.prod(shape)
    kept *= jnp.dtype(module.dtype).itemsize
    if kept >= free:
      raise errors.UserError(
        f"keys and values of {chunks} chunks take {kept / 2**30:.1f} GiB, of "
        f"{free / 2**30:.1f} that are free: make the window smaller"
      )
    return free - kept
