"""The transformer as the sampler's model: guided, and with a KV cache.

Each pass through the model has its own caches, one per chunk that was made
before; there are two passes where the branches of guidance go through it in
turn.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from dcvideogen_jax import sharding
from dcvideogen_jax.diffusion import guidance
from dcvideogen_jax.models import wan_blocks, wan_dit

# By pass through the model, the cache of each chunk before, in order.
Caches = Sequence[Sequence[wan_blocks.KVCache]]


def noise(
  seeds: Sequence[int], shape: tuple[int, ...], *numbers: int
) -> Float[Array, "b t h w c"]:
  """Standard normal noise of samples, float32.

  Args:
    seeds: of the samples, on which alone their noise depends.
    shape: of a sample's noise.
    *numbers: of a chunk, whose noise is its own whatever the length of the
      video. No other numbers may begin with those of a noise.
  """
  keys = [
    functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))
    for seed in seeds
  ]
  return jnp.stack([jax.random.normal(k, shape, jnp.float32) for k in keys])


def velocity(
  module: Any,
  guided: bool,
  batched: bool,
  x: Float[Array, "b t h w c"],
  t: Float[Array, " b"],
  variables: Mapping[str, Any],
  scale: Float[Array, ""],
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
  caches: Caches = (),
) -> Float[Array, "b t h w c"]:
  """The guided velocity of one step, in float32: a model for the sampler.

  Args:
    module: `WanDiT`.
    guided: whether `uncond` counts.
    batched: see `guidance.guided`.
    x: noisy latents.
    t: timesteps, 0 to 1000.
    variables: of the module.
    scale: of the guidance.
    cond, uncond: "text", for image to video also "image" and "extra", the mask
      and the encoded images of these frames.
    caches: of the chunks before; nothing for a video that is made at once.
  """
  if caches and guided and not batched:
    cond, uncond = (
      {**given, "cache": cache}
      for given, cache in zip((cond, uncond), caches, strict=True)
    )
    caches = ()

  def model(x, t, given):
    cache = given.get("cache", caches[0] if caches else ())
    return _apply(module, variables, x, t, given, cache)

  if not guided:
    return model(x, t, cond).astype(jnp.float32)
  return guidance.guided(model, scale, batched=batched)(x, t, cond, uncond)


def cache(
  module: Any,
  batched: bool,
  x: Float[Array, "b t h w c"],
  t: Float[Array, " b"],
  variables: Mapping[str, Any],
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
  caches: Caches,
) -> tuple[wan_blocks.KVCache, ...]:
  """Keys and values of a clean chunk for the chunks after it, by pass.

  Args:
    module, batched, variables, cond, uncond, caches: as for `velocity`.
    x: latents of the chunk.
    t: their timesteps.
  """

  def of_pass(x, t, given, cache):
    _, left = _apply(module, variables, x, t, given, cache, mutable=["cache"])
    return jax.tree.map(_split_heads, wan_dit.kv_cache(left))

  if uncond is None:
    return (of_pass(x, t, cond, caches[0]),)
  if not batched:
    passes = zip((cond, uncond), caches, strict=True)
    return tuple(of_pass(x, t, given, cache) for given, cache in passes)
  given = jax.tree.map(guidance.interleave, dict(cond), dict(uncond))
  x, t = (guidance.interleave(y, y) for y in (x, t))
  return (of_pass(x, t, given, caches[0]),)


def cache_spec(
  mesh: Mesh | AbstractMesh, shape: tuple[int, ...]
) -> PartitionSpec:
  """How a mesh splits what `cache` gives, of shape "layers b m k e"."""
  return sharding.divisible_spec(mesh, shape, None, "batch", None, "heads")


def _split_heads(x):
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, cache_spec(mesh, x.shape))


def _apply(module, variables, x, t, given, cache, **options):
  if "extra" in given:
    x = jnp.concatenate([x, given["extra"]], axis=-1)
  return module.apply(
    variables, x, t, given["text"], given.get("image"), past=cache, **options
  )
