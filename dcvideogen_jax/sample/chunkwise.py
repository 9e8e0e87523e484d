"""Makes a stream chunk by chunk, with a KV cache of the chunks before.

Each chunk of latents is denoised while it attends to the keys and values of the
clean chunks before it. One more pass of the finished chunk through the model
gives its own keys and values for the cache. With a window, the oldest chunks
leave the cache, except for the first few (arXiv 2309.17453), and memory no
longer grows.

Positions count the frames in the cache: the first of them has position 0,
later chunks follow without a gap, and the new chunk comes last. They are the
true positions until a chunk leaves the cache. After that they stay within
`sink + window + 1` chunks, a length that the model should have been trained on;
true positions would soon exceed all that it was trained on.
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
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow
from dcvideogen_jax.latents import conditions, denoiser, videos
from dcvideogen_jax.models import pieces, wan_blocks
from dcvideogen_jax.sample import (
  conditioning,
  denoise,
  generation,
  loading,
  options,
  placement,
  sizes,
)

Latents = Float[Array, "b t h w c"]

# Folded into the key before a chunk's number, for the noise that is added to
# the finished chunk. No chunk has this number, so no other noise has this key.
CLEAN = 2**32 - 1


class KVCache:
  """Keys and values of the chunks to attend to, by pass through the model."""

  def __init__(self, passes: int, sink: int, window: int | None):
    """Starts with an empty cache.

    Args:
      passes: passes through the model in each step: 2 if the branches of the
        guidance are not batched, otherwise 1.
      sink: number of chunks at the beginning that stay.
      window: number of chunks at the end that stay; None is all.
    """
    self._chunks: list[Sequence[wan_blocks.KVCache]] = []
    self._passes = passes
    self._sink = sink
    self._window = window

  def add(self, chunk: Sequence[wan_blocks.KVCache]) -> None:
    """Adds a chunk's keys and values of each pass; drops the oldest chunk."""
    self._chunks.append(chunk)
    if self._window is not None:
      beyond = len(self._chunks) - self._sink - self._window
      del self._chunks[self._sink : self._sink + max(0, beyond)]

  def by_pass(self) -> denoiser.Caches:
    """Returns the chunks of each pass, in the order in which they came."""
    return tuple(
      tuple(chunk[i] for chunk in self._chunks) for i in range(self._passes)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """A video that is made while it is iterated; each iteration makes it anew.

  Attributes:
    size: of the video, including given frames.
    settings: all settings of the run, ready for JSON.
    pipeline: `pipeline.DCVideoGen`.
    transformer: the model, with the chunk of this stream.
    asked: all options.
    how: how each chunk is denoised.
    shape: of one sample's latents in a chunk, `t h w c`.
    counts: number of given chunks, and of new ones.
    given: frames that the stream continues, uint8 (t, h, w, 3), or None.
    first: first frame for image to video, uint8 (h, w, 3); otherwise None.
    texts: embeddings of the prompts, by the new chunk from which they hold.
    negative: embeddings of the negative prompt; None without guidance.
    seeds: one per sample.
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
    """Yields float32 latents chunk by chunk, those of given frames first.

    The last chunk is whole, even if the video ends within it.
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
    """Yields decoded frames as they are made, of all samples or of one.

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
    """Writes one sample as an mp4, as `generation.Generation.save` does."""
    generation.save(self.chunks(sample), path, **options)

  @property
  def _passes(self) -> int:
    """Passes through the model in each step."""
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
      keys=self.pipeline.put(denoiser.keys(self.seeds, n)),
    )

  def _cached(self, x, inputs, cache, i):
    """Computes the keys and values of finished chunk `i`, by pass.

    `i` counts given chunks too.
    """
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
    """Returns the conditions of both branches of guidance for new chunk `n`."""
    text = self.texts[max(number for number in self.texts if number <= n)]
    if self.negative is None:
      return {"text": text, **image}, None
    return {"text": text, **image}, {"text": self.negative, **image}

  def _images(self) -> Iterator[dict[str, Array]]:
    """Yields the image condition of each chunk; {} for text to video."""
    if self.first is None:
      yield from itertools.repeat({})
    b, (t, h, w, _) = len(self.seeds), self.shape
    image = conditions.resize(self.first, *self.size[1:])
    with self.asked.phase("condition"):
      features = self.pipeline.put(
        np.repeat(conditioning.features(self.pipeline, [image]), b, 0)
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
    """Yields the latents of the given frames, chunk by chunk."""
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
    space.load_encoder()
    encoded = space.encode_stream(
      (x[None] for x in chunks), *grid, self._budget()
    )
    encoded = self.pipeline.each(encoded, self.asked.phase, "condition")
    for x, _ in pieces.regroup(encoded, t, eager=True):
      yield self.pipeline.put(np.repeat(x, len(self.seeds), axis=0))

  def _budget(self) -> float:
    """Returns bytes per device for the autoencoder, beside the full KV cache.

    Raises:
      errors.UserError: if the KV cache alone does not fit.
    """
    free: float = self.pipeline.budget(self.asked.memory_budget)
    if self.asked.memory_budget is not None:
      return free
    module = self.transformer.module
    sink, window = self.asked.sink, self.asked.window
    chunks = sum(self.counts) - 1
    if window is not None:
      # The cache holds a new chunk before it drops the oldest.
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
