"""Wraps the transformer as the sampler's model, with guidance and a KV cache.

Each pass through the transformer has its own KV caches, one for each earlier
chunk. Batched guidance and sampling without guidance take one pass. Sequential
guidance takes two passes, first with the condition and then without.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, UInt32

from dcvideogen_jax import sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import guidance
from dcvideogen_jax.models import wan_blocks, wan_dit

# For each pass through the transformer, the KV caches of the earlier chunks, in
# order.
Caches = Sequence[Sequence[wan_blocks.KVCache]]

# Folded into the keys of `keys`. No chunk has this number, so that no other
# noise has these keys.
_FRESH = 2**32 - 2


def noise(
  seeds: Sequence[int], shape: tuple[int, ...], *numbers: int
) -> Float[Array, "b ..."]:
  """Draws standard normal noise for a batch of samples, in float32.

  Args:
    seeds: one seed for each sample. A sample's noise does not depend on the
      rest of the batch.
    shape: shape of one sample's noise, `t h w c`.
    *numbers: folded into the key one after another, such as the number of a
      chunk, so that a chunk's noise does not depend on the length of the video.
      The numbers of one draw must not be a prefix of those of another.
  """
  return jnp.stack(
    [
      jax.random.normal(key, shape, jnp.float32)
      for key in _keys(seeds, numbers)
    ]
  )


def keys(seeds: Sequence[int], *numbers: int) -> UInt32[Array, "b n"]:
  """Returns data of keys for the noise that a solver draws in each step.

  Args:
    seeds: one seed for each sample.
    *numbers: as for `noise`, whose numbers these may be too.
  """
  found = _keys(seeds, (_FRESH, *numbers))
  return jnp.stack([jax.random.key_data(key) for key in found])


def _keys(seeds: Sequence[int], numbers: Sequence[int]) -> list[Array]:
  return [
    functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))
    for seed in seeds
  ]


def velocity(
  module: Any,
  guided: bool,
  batched: bool,
  x: Float[Array, "b t h w c"],
  t: Float[Array, " b"] | Float[Array, "b n"],
  variables: Mapping[str, Any],
  scale: Float[Array, ""],
  cond: Mapping[str, Any],
  uncond: Mapping[str, Any] | None,
  caches: Caches = (),
) -> Float[Array, "b t h w c"]:
  """Returns the guided velocity of one sampling step, in float32.

  Args:
    module: a `WanDiT`.
    guided: whether guidance is used. Without it, `uncond` is not read.
    batched: whether the two branches of guidance share one pass; see
      `guidance.guided`.
    x: noisy latents.
    t: timesteps, 0 to 1000, one per sample or one per frame of tokens.
    variables: `{"params": ...}` of the module.
    scale: guidance scale.
    cond, uncond: the inputs with and without the prompt: "text", and for image
      to video also "image" and "extra", the mask and the encoded images of
      these latent frames; "clean", a `wan_dit.Clean`, for teacher forcing.
    caches: KV caches of the earlier chunks, for each pass; empty where a video
      is sampled as a whole.
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
  """Returns the KV cache of a clean (denoised) chunk, one for each pass.

  Args:
    module, batched, variables, cond, caches: as for `velocity`.
    x: denoised latents of the chunk.
    t: timesteps of these latents, 0 to 1000.
    uncond: as for `velocity`, or None without guidance.
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
  """Returns how a mesh shards keys or values of a `KVCache`.

  Args:
    mesh: the mesh.
    shape: shape of the keys, `layers b m k e`, with m cached tokens.
  """
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
    variables,
    x,
    t,
    given["text"],
    given.get("image"),
    clean=given.get("clean"),
    past=cache,
    **options,
  )
