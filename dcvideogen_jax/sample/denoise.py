"""From noise to latents: the guided model, compiled, step by step."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from dcvideogen_jax import sharding
from dcvideogen_jax.diffusion import guidance, sampler
from dcvideogen_jax.models import wan_blocks, wan_dit
from dcvideogen_jax.sample import placement

# By pass through the model, what the chunks before left, in order. There are
# two passes where the branches of guidance go through it in turn.
Past = Sequence[Sequence[wan_blocks.KVCache]]

# Both branches of guidance go through the model at once up to so many tokens;
# beyond, one branch keeps a device busy and needs half the activations.
_BATCHED_TOKENS = 16384


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
  """Says nothing about what is being done."""
  del name
  return contextlib.nullcontext()


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
  past: Past = (),
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
    past: of the chunks before; nothing for a video that is made at once.
  """
  if past and guided and not batched:
    cond, uncond = (
      {**given, "past": p}
      for given, p in zip((cond, uncond), past, strict=True)
    )
    past = ()

  def model(x, t, given):
    seen = given.get("past", past[0] if past else ())
    return _apply(module, params, x, t, given, seen)

  if not guided:
    return model(x, t, cond).astype(jnp.float32)
  return guidance.guided(model, scale, batched=batched)(x, t, cond, uncond)


def remember(
  module: Any,
  batched: bool,
  x: Float[Array, "b t h w c"],
  t: Float[Array, " b"],
  params: Any,
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
  past: Past,
) -> tuple[wan_blocks.KVCache, ...]:
  """What a clean chunk leaves for the chunks after it, by pass.

  Args:
    module, batched, params, cond, uncond, past: as for `velocity`.
    x: latents of the chunk.
    t: their timesteps.
  """

  def kept(x, t, given, past):
    _, left = _apply(module, params, x, t, given, past, mutable=["cache"])
    return jax.tree.map(_split_heads, wan_dit.kv_cache(left))

  if uncond is None:
    return (kept(x, t, cond, past[0]),)
  if not batched:
    passes = zip((cond, uncond), past, strict=True)
    return tuple(kept(x, t, given, p) for given, p in passes)
  given = jax.tree.map(guidance.interleave, dict(cond), dict(uncond))
  x, t = (guidance.interleave(y, y) for y in (x, t))
  return (kept(x, t, given, past[0]),)


def _split_heads(x):
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, where_kept(mesh, x.shape))


def where_kept(
  mesh: Mesh | AbstractMesh, shape: tuple[int, ...]
) -> jax.sharding.PartitionSpec:
  """How a mesh splits what `remember` gives, of shape "layers b m k e"."""
  return sharding.divisible_spec(mesh, shape, None, "batch", None, "heads")


def _apply(module, params, x, t, given, past, **options):
  if "extra" in given:
    x = jnp.concatenate([x, given["extra"]], axis=-1)
  text, image = given["text"], given.get("image")
  return module.apply(
    {"params": params}, x, t, text, image, past=past, **options
  )


def batched_by_default(
  module: wan_dit.WanDiT,
  shape: tuple[int, ...],
  layout: placement.Layout | None = None,
) -> bool:
  """Whether guidance sends both branches through the transformer at once.

  Args:
    module: the transformer.
    shape: of the latents, `b t h w c`.
    layout: of several devices, which share samples and tokens.
  """
  tokens = 2 * math.prod(shape[:-1]) // math.prod(module.patch)
  if layout is not None:
    samples = sharding.batch_devices(layout.mesh)
    if shape[0] % samples:
      return True
    tokens //= samples * sharding.num_shards(layout.mesh, "tokens")
  return tokens <= _BATCHED_TOKENS


@functools.cache
def jit_step(
  module: Any, guided: bool, batched: bool, where: Any
) -> jax.stages.Wrapped:
  """`sampler.jit_step` of `velocity`; one object, which jax compiles once."""
  model = functools.partial(velocity, module, guided, batched)
  return sampler.jit_step(model, where)


@functools.cache
def _jit_all_steps(module, guided, batched, where):
  model = functools.partial(velocity, module, guided, batched)
  function = functools.partial(sampler.sample, model)
  return jax.jit(function, out_shardings=where)


@functools.cache
def jit_remember(module: Any, batched: bool) -> jax.stages.Wrapped:
  """`remember`, jitted; one object, which jax compiles once for its shapes."""
  return jax.jit(functools.partial(remember, module, batched))


def run(
  transformer: Any,
  noise: Float[Array, "b t h w c"],
  plan: sampler.SamplingPlan,
  scale: float,
  cond: Mapping[str, Array],
  uncond: Mapping[str, Array] | None,
  *,
  batched: bool,
  layout: placement.Layout | None,
  one_program: bool = False,
  past: Past = (),
  phase: Callable[..., contextlib.AbstractContextManager[Any]] = no_phase,
  on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "b t h w c"]:
  """Samples latents.

  Args:
    transformer: `loading.Part`.
    noise: standard normal, on all devices of the layout, as all inputs.
    plan: of the steps.
    scale: of the guidance; without `uncond` there is none.
    cond, uncond: as for `velocity`.
    batched: see `guidance.guided`.
    layout: of several devices; None is one.
    one_program: run all steps as one, without `on_step`.
    past: as for `velocity`.
    phase, on_step: as for `DCVideoGen.generate`.
  """
  module, variables = transformer
  where = layout and layout.everywhere
  guided = uncond is not None
  scale = jax.device_put(np.float32(scale), where)
  inputs = (variables["params"], scale, cond, uncond, past)
  if one_program:
    inputs = (noise, jax.device_put(plan, where), *inputs)
    with phase("compile"), placement.in_force(layout):
      function = _jit_all_steps(module, guided, batched, where)
      program = function.lower(*inputs).compile()
    with phase("denoise"):
      return jax.block_until_ready(program(*inputs))
  carry = jax.eval_shape(functools.partial(sampler.start, plan=plan), noise)
  carry = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), carry
  )
  with phase("compile"), placement.in_force(layout):
    row = jax.device_put(sampler.row(plan, 0), where)
    function = jit_step(module, guided, batched, where)
    program = function.lower(carry, row, *inputs).compile()
  with phase("denoise"):
    steps = sampler.stream(program, noise, plan, *inputs, where=where)
    for i, latents in steps:
      if on_step is not None:
        on_step(i, latents)
  return latents
