"""Renders sample videos with the parameters of a training in progress.

All steps of the solver are one compiled program, which every call reuses, since
only the parameters change. A block-causal model generates one chunk after the
other. Each chunk attends to the KV cache of the clean chunks before it, as in
streaming at `clean_level` 0, whatever level training uses. Batches are sharded
over the run's mesh. Their latents are decoded in bounded memory on the first
device of each process.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, UInt8, UInt32

from dcvideogen_jax import errors, memory, sharding
from dcvideogen_jax.diffusion import guidance, sampler
from dcvideogen_jax.latents import conditions, denoiser, latent_space

Video = UInt8[np.ndarray, "b t h w 3"]


class Settings(NamedTuple):
  """How videos are rendered.

  Attributes:
    plan: the solver's steps, from `sampler.plan`.
    guidance: guidance scale; 1 means no guidance, and half the work.
    frames, height, width: size of the videos, in frames and pixels.
    batch_size: videos that are sampled at once.
  """

  plan: sampler.SamplingPlan
  guidance: float
  frames: int
  height: int
  width: int
  batch_size: int


class Requests(NamedTuple):
  """The n videos to render, as arrays in host memory.

  Attributes:
    text: embeddings of the prompts, zero after a text's end.
    negative: embedding of the negative prompt.
    noise: standard normal; `t h w` count latents.
    image: CLIP features of the first frames, for image to video; otherwise
      None.
    condition: latents of the first frames, likewise.
    keys: data of a random key per video, from `denoiser.keys`, for solvers that
      draw noise in each step.
  """

  text: Float[np.ndarray, "n s e"]
  negative: Float[np.ndarray, "s e"]
  noise: Float[np.ndarray, "n t h w c"]
  image: Float[np.ndarray, "n m f"] | None = None
  condition: Float[np.ndarray, "n t h w c"] | None = None
  keys: UInt32[np.ndarray, "n k"] | None = None


def condition(
  space: latent_space.LatentSpace,
  image: UInt8[np.ndarray, "h w 3"],
  frames: int,
) -> Float[np.ndarray, "tz hz wz c"]:
  """Encodes a first frame followed by grey frames, as in training; float32.

  Args:
    space: the latent space, whose autoencoder encodes.
    image: the first frame, of the video's size.
    frames: of the video.
  """
  budget = memory.SHARE * memory.free()
  return np.asarray(space.condition(image, None, frames, budget)[0])


class Renderer:
  """Renders the same videos each time, with the parameters of the moment."""

  def __init__(
    self, module: Any, space: latent_space.LatentSpace, settings: Settings
  ):
    """Checks the size of the videos; nothing is compiled before the first call.

    Args:
      module: `WanDiT`, including any low-rank updates.
      space: the latent space of `module`, with variables on one device.
      settings: how videos are rendered.

    Raises:
      errors.UserError: if `module` cannot make latents of the videos' size.
    """
    self._size = (settings.frames, settings.height, settings.width)
    self.shape = space.grid(*self._size)
    if (
      any(n % p for n, p in zip(self.shape[:3], module.patch, strict=True))
      or module.out_channels != self.shape[-1]
    ):
      raise errors.UserError(
        f"a transformer of patches {module.patch} and {module.out_channels} "
        f"channels cannot make latents of shape {self.shape}"
      )
    self._module = module
    self._space = space
    self._settings = settings
    self._programs: dict[Any, Any] = {}

  def videos(self, variables: Any, requests: Requests) -> Video:
    """Renders all videos, in order.

    Args:
      variables: of the transformer: "params" and, with low-rank updates,
        "lora"; other keys are ignored.
      requests: the videos.
    """
    videos = []
    for latents in self.latents(variables, requests):
      with jax.set_mesh(_one_device()):
        budget = memory.SHARE * memory.free()
        pieces = self._space.decode(latents, self._size, jnp.float32, budget)
        videos.append(np.concatenate([*pieces], axis=1))
    return np.concatenate(videos)

  def latents(
    self, variables: Any, requests: Requests
  ) -> Iterator[Float[np.ndarray, "b t h w c"]]:
    """Yields latents batch by batch; takes the arguments of `videos`."""
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else sharding.batch_devices(mesh)
    size = -(-self._settings.batch_size // devices) * devices
    weights = {k: variables[k] for k in ("params", "lora") if k in variables}
    total = len(requests.noise)
    for start in range(0, total, size):
      # The last batch is padded: another size would compile another program.
      rows = np.arange(start, start + size) % total
      cond = {"text": requests.text[rows]}
      if requests.image is not None:
        mask = self._space.mask(self._size[0], last=False)
        extra = conditions.extra(mask, requests.condition[rows])
        cond |= {"image": requests.image[rows], "extra": extra}
      negative = np.broadcast_to(requests.negative, cond["text"].shape)
      made = self._program(mesh)(
        self._settings.plan,
        weights,
        np.float32(self._settings.guidance),
        requests.noise[rows],
        None if requests.keys is None else requests.keys[rows],
        cond,
        {**cond, "text": negative},
      )
      yield np.asarray(made)[: total - start]

  def _program(self, mesh: Any) -> Any:
    """Returns the jitted solver steps for the devices of a mesh."""
    if mesh not in self._programs:
      whole = None if mesh.empty else NamedSharding(mesh, P())
      self._programs[mesh] = jax.jit(self._sample, out_shardings=whole)
    return self._programs[mesh]

  def _sample(self, plan, weights, scale, noise, keys, cond, uncond):
    noise, keys, cond, uncond = jax.tree.map(
      lambda x: sharding.constrain(jnp.asarray(x), "batch"),
      (noise, keys, cond, uncond),
    )
    module, frames = self._module, noise.shape[1]
    size = frames
    if module.chunk is not None:
      size = module.chunk * module.patch[0]
    guided = guidance.needed(self._settings.guidance)
    model = functools.partial(denoiser.velocity, module, guided, True)
    chunks, caches = [], ()
    for start in range(0, frames, size):
      inputs = (
        _frames(cond, start, size),
        _frames(uncond, start, size) if guided else None,
        (caches,),
      )
      x = noise[:, start : start + size]
      own = keys
      if keys is not None:
        own = jax.vmap(functools.partial(_folded, start))(keys)
      x = sampler.sample(model, x, plan, weights, scale, *inputs, keys=own)
      chunks.append(x)
      if start + size < frames:
        t = jnp.zeros(len(x), jnp.float32)
        caches += denoiser.cache(module, True, x, t, weights, *inputs)
    return jnp.concatenate(chunks, axis=1)


def _folded(number, key):
  """Folds a number into the data of a key."""
  key = jax.random.wrap_key_data(key)
  return jax.random.key_data(jax.random.fold_in(key, number))


def _frames(given, start, size):
  """Restricts a condition to the frames of a chunk."""
  if "extra" not in given:
    return given
  return {**given, "extra": given["extra"][:, start : start + size]}


def _one_device() -> jax.sharding.Mesh:
  """Returns a mesh of this process's first device alone."""
  return jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("one",))
