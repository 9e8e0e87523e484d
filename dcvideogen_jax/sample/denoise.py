"""The diffusion model as the sampler sees it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

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
