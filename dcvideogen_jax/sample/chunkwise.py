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
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcvideogen_jax import errors
from dcvideogen_jax.adapt import encode
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.models import pieces, wan_blocks
from dcvideogen_jax.sample import conditions, denoise, loading, placement, sizes

Latents = Float[Array, "b t h w c"]

# Comes first among the numbers of `noise`; there is no such chunk.
CLEAN = 2**32 - 1


class Kept:
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

  def past(self) -> denoise.Past:
    """In the order in which the chunks were added."""
    return tuple(
      tuple(chunk[i] for chunk in self._chunks) for i in range(self._passes)
    )


def noise(
  seeds: Sequence[int], shape: tuple[int, ...], *numbers: int
) -> Float[Array, "b t h w c"]:
  """Standard normal noise of a chunk, whatever the length of the video.

  Args:
    seeds: of the samples.
    shape: of a sample's chunk.
    *numbers: of the chunk, from 0; after `CLEAN`, for what a finished chunk is
      looked at with. No other numbers may begin with those of a noise.
  """
  keys = [
    functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))
    for seed in seeds
  ]
  return jnp.stack([jax.random.normal(k, shape, jnp.float32) for k in keys])


@dataclasses.dataclass(frozen=True)
class Run:
  """How a stream is made: arguments of `streams.start`, checked and in form.

  `shape` is of a chunk's latents without samples, `chunks` the numbers of those
  that are given and those that are made, `keep` sink and window.
  """

  made: Any
  transformer: loading.Part
  shape: tuple[int, int, int, int]
  size: sizes.Size
  chunks: tuple[int, int]
  given: np.ndarray | None
  first: np.ndarray | None
  texts: Mapping[int, Array]
  negative: Array | None
  seeds: Sequence[int]
  plan: sampler.SamplingPlan
  scale: float
  batched: bool
  keep: tuple[int, int | None]
  clean_level: float
  memory_budget: float | None
  phase: Callable[..., Any]
  on_step: Callable[[int, Array], None] | None

  def latents(self) -> Iterator[Latents]:
    """All chunks, those that are given first."""
    known, count = self.chunks
    kept = Kept(self._passes, *self.keep)
    images = self._images()
    for i, x in enumerate(self._known()):
      yield x
      kept.add(self._remember(x, self._inputs(0, next(images)), kept, i))
    for n in range(count):
      inputs = self._inputs(n, next(images))
      x = self._denoise(n, inputs, kept)
      yield x
      if n + 1 < count:
        kept.add(self._remember(x, inputs, kept, known + n))

  def decode(self, chunks: Iterator[Latents]) -> Iterator[np.ndarray]:
    """What `latents` gives, as video of the right size."""
    grid = (len(self.seeds), *self.shape[1:3])
    parts = self.made.parts
    budget = self._budget()
    with placement.in_force(self.made.layout):
      video = parts.space.decode_stream(
        chunks, grid, self.size, parts.dtype, budget
      )
    return self.made.each(video, self.phase, "decode")

  @property
  def _passes(self) -> int:
    """Through the model for each step."""
    return 1 if self.negative is None or self.batched else 2

  def _denoise(self, n, inputs, kept):
    def on_step(i, x):
      if self.on_step is not None:
        self.on_step(n * self.plan.steps + i, x)

    return denoise.run(
      self.transformer,
      self.made.put(noise(self.seeds, self.shape, n)),
      self.plan,
      self.scale,
      *inputs,
      batched=self.batched,
      layout=self.made.layout,
      past=kept.past(),
      phase=self.phase,
      on_step=on_step,
    )

  def _remember(self, x, inputs, kept, i):
    """Keys and values of finished chunk `i` of all, by pass."""
    module, variables = self.transformer
    if self.clean_level:
      other = self.made.put(noise(self.seeds, self.shape, CLEAN, i))
      x = flow.add_noise(x, other, self.clean_level)
    time = np.float32(self.clean_level * flow.TRAIN_STEPS)
    t = self.made.put(np.full(len(self.seeds), time))
    args = (x, t, variables["params"], *inputs, kept.past())
    with self.phase("compile"), placement.in_force(self.made.layout):
      function = denoise.jit_remember(module, self.batched)
      program = function.lower(*args).compile()
    with self.phase("denoise"):
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
    with self.phase("condition"):
      features = self.made.put(np.repeat(self.made.features([image]), b, 0))
    space = self.made.parts.space
    grid = (h * space.spatial, w * space.spatial)
    video = encode.condition_video(
      conditions.pad(image, grid)[None],
      sum(self.chunks) * t * space.temporal,
      space.temporal,
    )
    encoded = space.encode(video, *grid, self._budget())
    encoded = self.made.each(encoded, self.phase, "condition")
    mask = np.ones((1, 1, h, w, space.temporal), np.float32)
    for x, _ in pieces.regroup(encoded, t, eager=True):
      mask = np.pad(mask, ((0, 0), (0, t - 1), (0, 0), (0, 0), (0, 0)))
      extra = np.concatenate([mask, x], axis=-1)
      extra = self.made.put(np.repeat(extra, b, axis=0))
      yield {"image": features, "extra": extra}
      mask = np.zeros((1, 1, h, w, space.temporal), np.float32)

  def _known(self) -> Iterator[Latents]:
    """Latents of the given frames, chunk by chunk."""
    if self.given is None:
      return
    t, h, w, _ = self.shape
    space = self.made.parts.space
    grid = (h * space.spatial, w * space.spatial)
    step = t * space.temporal
    clips = (
      np.stack([conditions.pad(x, grid) for x in self.given[i : i + step]])
      for i in range(0, len(self.given), step)
    )
    encoded = space.encode((x[None] for x in clips), *grid, self._budget())
    encoded = self.made.each(encoded, self.phase, "condition")
    for x, _ in pieces.regroup(encoded, t, eager=True):
      yield self.made.put(np.repeat(x, len(self.seeds), axis=0))

  def _budget(self) -> float:
    """Bytes of a device for the autoencoder, beside keys and values to come.

    Raises:
      errors.UserError: if these alone do not fit.
    """
    free: float = self.made.budget(self.memory_budget)
    if self.memory_budget is not None:
      return free
    module = self.transformer.module
    sink, window = self.keep
    chunks = sum(self.chunks) - 1
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
    if self.made.layout is not None:
      mesh = self.made.layout.mesh
      spec = denoise.where_kept(mesh, shape)
      shape = jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)
    kept = 2 * chunks * passes * math.prod(shape)
    kept *= jnp.dtype(module.dtype).itemsize
    if kept >= free:
      raise errors.UserError(
        f"keys and values of {chunks} chunks take {kept / 2**30:.1f} GiB, of "
        f"{free / 2**30:.1f} that are free: make the window smaller"
      )
    return free - kept
