"""The diffusion model as the sampler sees it, and the noise it starts from."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcvideogen_jax import errors
from dcvideogen_jax.diffusion import guidance


def velocity(
  module: Any,
  guided: bool,
  batched: bool,
  x: Float[Array, "b t h w c"],
  t: Float[Array, " b"],
  params: Any,
  scale: Float[Array, ""],
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
) -> Float[Array, "b t h w c"]:
  """The guided velocity of one step, in float32: a model for the sampler.

  Args:
    module: `WanDiT`.
    guided: whether `uncond` counts.
    batched: see `guidance.guided`.
    x: noisy latents.
    t: timesteps, 0 to 1000.
    params: of the module.
    scale: of the guidance.
    cond, uncond: "text", for image to video also "image" and "extra"; see
      `DCVideoGen.condition`.
  """

  def model(x, t, given):
    if "extra" in given:
      x = jnp.concatenate([x, given["extra"]], axis=-1)
    return module.apply(
      {"params": params}, x, t, given["text"], given.get("image")
    )

  if not guided:
    return model(x, t, cond).astype(jnp.float32)
  return guidance.guided(model, scale, batched=batched)(x, t, cond, uncond)


def noise_of(
  noise: Any | None, seed: int | Sequence[int], shape: tuple[int, ...]
) -> tuple[Float[Array, "b t h w c"], list[int] | None]:
  """The noise, and the seeds it came from (None if it was given)."""
  if noise is not None:
    noise = jnp.asarray(noise, jnp.float32)
    if noise.shape != shape:
      raise errors.UserError(
        f"the noise must have the shape {shape}, found {noise.shape}"
      )
    return noise, None
  seeds = [seed] * shape[0] if isinstance(seed, int) else list(seed)
  if len(seeds) != shape[0]:
    raise errors.UserError(
      f"expected a seed per prompt, {shape[0]}, found {len(seeds)}"
    )
  samples = [
    jax.random.normal(jax.random.key(s), shape[1:], jnp.float32) for s in seeds
  ]
  return jnp.stack(samples), seeds
