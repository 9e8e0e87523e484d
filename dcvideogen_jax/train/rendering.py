"""Makes videos with the parameters of a training, to be looked at.

All steps of the solver are one program, which every call uses again: only the
parameters change. A block-causal model makes one chunk after the other, each of
which sees what the clean chunks before it left, as in streaming at a
`clean_level` of 0, whatever that of training is. Batches are
split over the devices of the run's mesh; what a batch becomes is decoded in
bounded memory on the first device of each process.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, UInt8

from dcvideogen_jax import errors, memory, sharding
from dcvideogen_jax.adapt import align, encode
from dcvideogen_jax.diffusion import guidance, sampler
from dcvideogen_jax.models import (
  bands,
  dc_ae_v,
  streaming,
  wan_dit,
  wan_vae,
)

Video = UInt8[np.ndarray, "b t h w 3"]

# Of free memory, what decoding is planned with.
_SHARE = 0.8


class Autoencoder(NamedTuple):
  """DC-AE-V or Wan's: what turns latents into videos, and images into latents.

  Attributes:
    module: a `DCAEV` or a `WanVAE`.
    variables: `{"params": ...}`, on one device.
  """

  module: Any
  variables: Mapping[str, Any]

  @property
  def deep(self) -> bool:
    """Whether it is DC-AE-V."""
    return isinstance(self.module, dc_ae_v.DCAEV)

  def grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Latent frames, rows, columns and channels of a video.

    Raises:
      errors.UserError: if the autoencoder would make another size of it.
    """
    m = self.module
    first = 0 if self.deep else 1
    t, *rest = (
      divmod(n, factor)
      for n, factor in (
        (frames - first, m.temporal_factor),
        (height, m.spatial_factor),
        (width, m.spatial_factor),
      )
    )
    if any(left for _, left in (t, *rest)) or frames < 1:
      begin = f"{first} + " if first else ""
      raise errors.UserError(
        f"the autoencoder makes videos of {begin}{m.temporal_factor}k frames "
        f"and multiples of {m.spatial_factor} pixels, found {frames} frames of "
        f"{height}x{width}"
      )
    return t[0] + first, *(n for n, _ in rest), m.latent_channels

  def decode(self, latents: Float[np.ndarray, "b t h w c"]) -> Video:
    """Videos of latents as the diffusion model has them."""
    m = self.module
    if not self.deep:
      pieces = wan_vae.stream_decode(
        m, self.variables, [np.asarray(m.denormalise(latents))], dtype=np.uint8
      )
      return np.concatenate(list(pieces), axis=1)
    b, t, h, w, _ = latents.shape
    size = [n * m.spatial_factor for n in (h, w)]
    plan = self._plan(m, t, size, memory.free() / b, decode=True)
    chunks = streaming.decode(
      m,
      self.variables,
      [latents / m.latent_scale],
      plan=plan,
      dtype=np.uint8,
    )
    return np.concatenate([np.asarray(x) for x in chunks], axis=1)

  def condition(
    self, image: UInt8[np.ndarray, "h w 3"], frames: int
  ) -> Float[np.ndarray, "t h w c"]:
    """Latents of a first frame amid grey, as training has them, float32."""
    m = self.module
    repeats = m.temporal_factor if self.deep else 1
    video = encode.condition_video(image[None], frames, repeats)
    if not self.deep:
      return np.asarray(encode.stream_base(m, self.variables, video)[0])
    t, size = frames // m.temporal_factor, image.shape[:2]
    exact = m.clone(dtype=jnp.float32)
    plan = self._plan(exact, t, size, memory.free(), decode=False)
    found = encode.stream_deep(m, self.variables, video, frames, plan)
    return np.asarray(found[0])

  def _plan(self, module, t, size, free, decode):
    chunk = module.chunk_frames // module.temporal_factor
    return bands.plan(
      module, *size, _SHARE * free, decode=decode, streamed=t > chunk
    )


class Settings(NamedTuple):
  """How videos are made.

  Attributes:
    plan: of the solver's steps, as of `sampler.plan`.
    guidance: scale; 1 is no guidance, and half the work.
    frames, height, width: of the videos.
    batch_size: videos that are made at once.
  """

  plan: sampler.SamplingPlan
  guidance: float
  frames: int
  height: int
  width: int
  batch_size: int


class Requests(NamedTuple):
  """Videos to make: arrays with a leading axis of videos, in host memory.

  Attributes:
    text: embeddings of the prompts, (n, s, e), zero after the text's end.
    negative: of what guidance leads away from, (s, e).
    noise: standard normal, (n, t, h, w, c).
    image: CLIP features (n, m, f), for image to video; else None.
    condition: encoded first frames (n, t, h, w, c), likewise.
  """

  text: Float[np.ndarray, "n s e"]
  negative: Float[np.ndarray, "s e"]
  noise: Float[np.ndarray, "n t h w c"]
  image: Float[np.ndarray, "n m f"] | None = None
  condition: Float[np.ndarray, "n t h w c"] | None = None


def noise(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
  """Noise of each seed, the same as sampling draws from it: (n, *shape)."""
  draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32)
  return np.stack([np.asarray(draw(jax.random.key(seed))) for seed in seeds])


class Renderer:
  """Makes the same videos again and again, with other parameters."""

  def __init__(self, module: Any, autoencoder: Autoencoder, settings: Settings):
    """Prepares; nothing is compiled before the first video.

    Args:
      module: `WanDiT`, low-rank updates and all.
      autoencoder: whose latents it makes.
      settings: how.

    Raises:
      errors.UserError: if the size of the videos does not fit.
    """
    self.shape = autoencoder.grid(
      settings.frames, settings.height, settings.width
    )
    if (
      any(n % p for n, p in zip(self.shape[:3], module.patch, strict=True))
      or module.out_channels != self.shape[-1]
    ):
      raise errors.UserError(
        f"a transformer of patches {module.patch} and {module.out_channels} "
        f"channels cannot make latents of shape {self.shape}"
      )
    self._module = module
    self._autoencoder = autoencoder
    self._settings = settings
    self._programs: dict[Any, Any] = {}

  @property
  def tokens(self) -> int:
    """Of the transformer, for one video."""
    return math.prod(self.shape[:3]) // math.prod(self._module.patch)

  def videos(self, variables: Any, requests: Requests) -> Video:
    """All videos, in order.

    Args:
      variables: of the transformer, "params" and maybe "lora"; others are not
        looked at.
      requests: what to make.
    """
    found = []
    for latents in self.latents(variables, requests):
      with jax.set_mesh(_one_device()):
        found.append(self._autoencoder.decode(latents))
    return np.concatenate(found)

  def latents(
    self, variables: Any, requests: Requests
  ) -> Iterator[Float[np.ndarray, "b t h w c"]]:
    """Latents batch by batch; arguments as of `videos`."""
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else sharding.batch_devices(mesh)
    size = -(-self._settings.batch_size // devices) * devices
    weights = {k: variables[k] for k in ("params", "lora") if k in variables}
    total = len(requests.noise)
    for start in range(0, total, size):
      # The last batch is filled up: another size would be another program.
      rows = np.arange(start, start + size) % total
      given = {
        name: getattr(requests, name)[rows]
        for name in ("text", "image", "condition")
        if getattr(requests, name) is not None
      }
      negative = np.broadcast_to(requests.negative, given["text"].shape)
      found = self._program(mesh)(
        self._settings.plan,
        weights,
        np.float32(self._settings.guidance),
        requests.noise[rows],
        given,
        {**given, "text": negative},
      )
      yield np.asarray(found)[: total - start]

  def _program(self, mesh: Any) -> Any:
    """All steps, for the devices of a mesh."""
    if mesh not in self._programs:
      whole = None if mesh.empty else NamedSharding(mesh, P())
      self._programs[mesh] = jax.jit(self._sample, out_shardings=whole)
    return self._programs[mesh]

  def _sample(self, plan, weights, scale, noise, given, otherwise):
    split = functools.partial(
      jax.tree.map, lambda x: sharding.constrain(jnp.asarray(x), "batch")
    )
    noise, given, otherwise = split((noise, given, otherwise))
    frames = noise.shape[1]
    size = frames
    if self._module.chunk is not None:
      size = self._module.chunk * self._module.patch[0]
    guided = guidance.needed(self._settings.guidance)
    made, past = [], ()
    for start in range(0, frames, size):
      chunk = slice(start, start + size)
      run = functools.partial(self._apply, weights, chunk, past)

      def velocity(x, t, run=run):
        if not guided:
          return run(x, t, given).astype(jnp.float32)
        return guidance.guided(run, scale)(x, t, given, otherwise)

      made.append(sampler.sample(velocity, noise[:, chunk], plan))
      if chunk.stop < frames:
        x, both = made[-1], given
        if guided:
          x = guidance.interleave(x, x)
          both = jax.tree.map(guidance.interleave, given, otherwise)
        t = jnp.zeros(len(x), jnp.float32)
        _, kept = run(x, t, both, mutable=["cache"])
        past = (*past, wan_dit.kv_cache(kept))
    return jnp.concatenate(made, axis=1)

  def _apply(self, weights, chunk, past, x, t, given, **options):
    """The model on a chunk of frames."""
    if "condition" in given:
      latents = jnp.pad(x, ((0, 0), (chunk.start, 0), (0, 0), (0, 0), (0, 0)))
      condition = given["condition"][:, : latents.shape[1]]
      x = align.condition(latents, condition)[:, chunk]
    return self._module.apply(
      weights,
      x,
      t,
      given["text"],
      given.get("image"),
      past=past,
      **options,
    )


def _one_device() -> jax.sharding.Mesh:
  """A mesh of this process's first device alone."""
  return jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("one",))
