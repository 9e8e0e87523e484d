"""Turns noise into latents with the compiled, guided model, step by step."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt32

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow, guidance, sampler
from dcvideogen_jax.latents import denoiser
from dcvideogen_jax.models import wan_dit
from dcvideogen_jax.sample import arguments, options, placement

# Up to this many tokens per device, the two branches of guidance share one
# batch. Beyond, one branch keeps a device busy and needs half the activations.
_BATCHED_TOKENS = 16384


class Denoising(NamedTuple):
  """How latents are denoised, from checked options.

  Attributes:
    options: solver and grid of noise levels.
    plan: the solver's steps.
    scale: guidance scale.
    guided: whether guidance is on, so that both of its branches are computed.
    batched: whether both branches share one batch; see `guidance.guided`.
    negative: the negative prompt.
  """

  options: flow.Options
  plan: sampler.SamplingPlan
  scale: float
  guided: bool
  batched: bool
  negative: arguments.Prompt

  def told(self) -> dict[str, Any]:
    """Returns the options for JSON; explicit levels have no grid or shift."""
    found = self.options._asdict()
    if self.options.levels is not None:
      levels = [*self.options.levels]
      found |= {"levels": levels, "grid": None, "shift": None}
    return found


def plan(
  how: flow.Options, shift: float | None, steps: int | None
) -> tuple[flow.Options, sampler.SamplingPlan]:
  """Plans the solver's steps, and returns its options with the shift.

  Args:
    how: solver and noise levels.
    shift, steps: as in `options.Options`; a shift of None is that of `how`.

  Raises:
    errors.UserError: for options that do not fit.
  """
  if how.levels is not None and shift is not None:
    raise errors.UserError(
      f"explicit noise levels are not shifted: expected no shift, found {shift}"
    )
  if steps is None:
    steps = len(how.levels or range(options.STEPS))
  if shift is not None:
    how = how._replace(shift=arguments.number(shift, "shift"))
  schedule = how.schedule(arguments.steps(steps))
  return how, sampler.plan(schedule, how.solver, **how.solver_options)


def batched_by_default(
  module: wan_dit.WanDiT,
  shape: tuple[int, ...],
  layout: placement.Layout | None = None,
) -> bool:
  """Decides whether the two branches of guidance share one batch.

  Args:
    module: the transformer.
    shape: of the latents, `b t h w c`.
    layout: the devices that share samples and tokens; None is one device.
  """
  tokens = 2 * math.prod(shape[:-1]) // math.prod(module.patch)
  if layout is not None:
    samples = sharding.batch_devices(layout.mesh)
    if shape[0] % samples:
      return True
    tokens //= samples * sharding.num_shards(layout.mesh, "tokens")
  return tokens <= _BATCHED_TOKENS


def prepare(
  pipeline: Any, asked: options.Options, module: Any, shape: tuple[int, ...]
) -> Denoising:
  """Checks options, and settles how a pipeline denoises latents.

  Args:
    pipeline: `pipeline.DCVideoGen`.
    asked: the options.
    module: the transformer.
    shape: of the latents, `b t h w c`.

  Raises:
    errors.UserError: for options that do not fit.
  """
  scale = arguments.number(asked.guidance_scale, "guidance_scale")
  guided = guidance.needed(scale)
  solver, plan = pipeline.plan(asked.options, asked.shift, asked.steps)
  batched = asked.batched
  if batched is None:
    batched = batched_by_default(module, shape, pipeline.layout)
  if pipeline.layout is not None:
    pipeline.layout.check_batch((2 if batched and guided else 1) * shape[0])
  negative = asked.negative_prompt
  if negative is None:
    negative = pipeline.negative_prompt()
  return Denoising(solver, plan, scale, guided, batched, negative)


@functools.cache
def jit_step(
  module: Any, guided: bool, batched: bool, where: Any
) -> jax.stages.Wrapped:
  """Returns the `sampler.jit_step` of a model, cached so that it compiles once.

  Args:
    module, guided, batched: as for `denoiser.velocity`.
    where: sharding of the latents and of the solver's state, or None.
  """
  model = functools.partial(denoiser.velocity, module, guided, batched)
  return sampler.jit_step(model, where)


@functools.cache
def _jit_all_steps(module, guided, batched, where):
  model = functools.partial(denoiser.velocity, module, guided, batched)
  function = functools.partial(sampler.sample, model)
  return jax.jit(function, out_shardings=where)


@functools.cache
def jit_cache(module: Any, batched: bool) -> jax.stages.Wrapped:
  """Returns the jitted `denoiser.cache`, cached so that it compiles once."""
  return jax.jit(functools.partial(denoiser.cache, module, batched))


def run(
  pipeline: Any,
  transformer: Any,
  how: Denoising,
  noise: Float[Array, "b t h w c"],
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
  *,
  phase: Callable[..., contextlib.AbstractContextManager[Any]],
  on_step: Callable[[int, Array], None] | None,
  one_program: bool = False,
  caches: denoiser.Caches = (),
  keys: UInt32[Array, "b n"] | None = None,
) -> Float[Array, "b t h w c"]:
  """Samples latents from noise.

  Args:
    pipeline: `pipeline.DCVideoGen`.
    transformer: that of the pipeline, or the same with other chunks.
    how: the steps and the guidance, which is off if `uncond` is None.
    noise: standard normal. Like all inputs, it is replicated over the layout.
    cond, uncond, caches: as for `denoiser.velocity`.
    phase, on_step, one_program: as in `options.VideoOptions`; `on_step` is None
      with `one_program`.
    keys: as for `sampler.start`, replicated like the noise.
  """
  module, variables = transformer
  layout, plan = pipeline.layout, how.plan
  where = layout and layout.everywhere
  guided = uncond is not None
  scale = jax.device_put(np.float32(how.scale), where)
  inputs = (variables, scale, cond, uncond, caches)
  if one_program:
    inputs = (noise, jax.device_put(plan, where), *inputs)
    with phase("compile"), placement.in_force(layout):
      function = _jit_all_steps(module, guided, how.batched, where)
      program = function.lower(*inputs, keys=keys).compile()
    with phase("denoise"):
      return jax.block_until_ready(program(*inputs, keys=keys))
  carry = jax.eval_shape(
    lambda noise, keys: sampler.start(noise, plan, keys), noise, keys
  )
  carry = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), carry
  )
  with phase("compile"), placement.in_force(layout):
    row = jax.device_put(sampler.row(plan, 0), where)
    function = jit_step(module, guided, how.batched, where)
    program = function.lower(carry, row, *inputs).compile()
  with phase("denoise"):
    steps = sampler.stream(
      program, noise, plan, *inputs, where=where, keys=keys
    )
    for i, latents in steps:
      if on_step is not None:
        on_step(i, latents)
  return latents
