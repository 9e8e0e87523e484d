"""Compiles sampling for devices that are not present.

The programs are those of `sample.pipeline` for one prompt: the text encoder,
the image encoder, the encoder of the condition, a solver step and the decoder.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.diffusion import guidance, sampler
from dcvideogen_jax.latents import conditions, spaces
from dcvideogen_jax.models import bands, eight_bits, wan_dit
from dcvideogen_jax.plan import (
  autoencoder,
  compiled,
  hardware,
  residency,
  roofline,
)
from dcvideogen_jax.sample import (
  arguments,
  denoise,
  loading,
  pipeline,
  placement,
  sizes,
)


def parts(
  variant: str,
  dtype: DTypeLike,
  weights: str | None = None,
  part: Callable[..., loading.LoadedModel] = compiled.part,
  fast: bool = False,
) -> loading.Parts:
  """Returns the parts of a published model, with shapes in place of weights.

  They are what `loading.load` returns for the model.

  Args:
    variant: a key of `wan_dit.VARIANTS`.
    dtype: bfloat16 or float32, as for `loading.load`.
    weights: as for `loading.load`.
    part: builds a part, as `compiled.part`, which takes seconds.
    fast: whether DC-AE-V has its fast decoder.
  """
  loading.check_weights(weights)
  weights = weights if weights in eight_bits.FORMATS else None
  dtype = jnp.dtype(dtype)
  both = {"dtype": dtype, "param_dtype": dtype}
  transformer = part("wan_dit", variant, weights=weights, **both)
  if variant.startswith("dc-"):
    module, variables = part("dc_ae_v", "f32t4c32", **both)
    decoder, params = module, {**variables["params"]}
    if fast:
      decoder, more = part("dc_ae_v_decoder", "f32t4c32", **both)
      params |= more["params"]
    if transformer.module.image_width is None:
      del params["encoder"]  # It is not loaded for text to video.
    space = spaces.DCAEVLatents(module, {"params": params}, decoder)
  elif fast:
    raise errors.UserError(f"DC-AE-V alone has a fast decoder, found {variant}")
  else:
    space = spaces.WanVAELatents(*part("wan_vae", "wan2.1"))
  encoder = part("umt5", "umt5_xxl", weights=weights, **both)
  seen = transformer.module.image_width is not None
  return loading.Parts(
    transformer,
    space,
    loading.Texts(None, encoder),
    part("clip_vision", "vit_h_14") if seen else None,
    dtype=dtype,
  )


def size(config: Any) -> sizes.Size:
  """Returns the size of the video that a sampling config makes.

  If the size follows an image's shape, an image of 16:9 is assumed.
  """
  height, width = config.height, config.width
  if height is None or width is None:
    height, width = sizes.of_image(9, 16, config.area, 2)
  return sizes.checked(config.frames, height, width)


def measure_config(
  config: Any,
  target: hardware.Target,
  tell: Callable[[str], None] = lambda phase: None,
  text_encoder: str = "device",
  memory_budget: float | None = None,
  fast: bool = False,
) -> dict[str, Any]:
  """Compiles and measures the sampling that a config of `sample` describes.

  Args:
    config: a config of `sample.presets`, with `variant`.
    target: the hardware to compile for.
    tell: is called with the name of each phase before it is compiled.
    text_encoder, memory_budget: as for `measure`.
    fast: as for `parts`.

  Returns:
    The result of `measure`.

  Raises:
    compiled.TooLarge: as `measure`.
    errors.UserError: if the config has no `variant`, or values that do not fit.
  """
  if config.variant is None:
    raise errors.UserError(
      "a plan needs config.variant, one of "
      f"{', '.join(wan_dit.VARIANTS)}; found none"
    )
  dtype = config.dtype or "bfloat16"
  return measure(
    parts(config.variant, dtype, config.weights, fast=fast),
    size(config),
    target,
    config.mesh,
    config.sharding,
    guided=guidance.needed(
      arguments.number(config.guidance_scale, "guidance_scale")
    ),
    steps=config.steps,
    tell=tell,
    text_encoder=text_encoder,
    memory_budget=memory_budget,
  )


def weights(parts: loading.Parts) -> dict[str, int]:
  """Returns the bytes of each part's weights on one device."""
  assert parts.texts is not None
  found = {
    "transformer": parts.transformer,
    "text encoder": parts.texts.encoder,
    "image encoder": parts.image_encoder,
    "autoencoder": parts.space,
  }
  return {k: compiled.size(v.variables) for k, v in found.items() if v}


def measure(
  parts: loading.Parts,
  size: sizes.Size,
  target: hardware.Target,
  mesh: Mapping[str, int] | None = None,
  rules: Sequence[sharding.Rule] = ((".*", "replicate"),),
  *,
  guided: bool = True,
  steps: int = 50,
  tell: Callable[[str], None] = lambda phase: None,
  text_encoder: str = "device",
  memory_budget: float | None = None,
) -> dict[str, Any]:
  """Compiles the sampling of one video; returns its memory, work and time.

  Args:
    parts: result of `parts`.
    size: size of the video.
    target: the hardware to compile for.
    mesh: sizes of the mesh axes, as for `sharding.make_mesh`.
    rules: sharding rules of the weights, as in `placement.Layout`.
    guided: whether classifier-free guidance is used.
    steps: number of solver steps.
    tell: is called with the name of each phase before it is compiled.
    text_encoder: "device"; "once" if it embeds the texts and goes before the
      other models come, and CLIP and the encoder of DC-AE-V likewise; or "host"
      if it is not on the device at all.
    memory_budget: bytes that encoding and decoding may take beyond the weights;
      None is the share of what is left that the pipeline takes.

  Returns:
    - "latents": frames, height, width and channels of the latents.
    - "weights": result of `weights`; those that go before others come have a
      name of their own.
    - "phases": by name, in order, "runs" and a `compiled.report` of one run;
      "held", the bytes of all results of earlier phases, as if all of them
      stayed; and "plan", where the phase has one.
    - "peak": bytes of the weights and the largest phase that are there at once.
    - "limit": bytes of a device that jax may use.
    - "step": "flops", "traffic" and "collectives" of one step on one device, as
      in `roofline.Work`, and "passes", the number of calls of the transformer.
    - "seconds": the fields of `roofline.Estimate` for one step.

  Raises:
    compiled.TooLarge: if the weights do not fit, or leave too little memory for
      any plan.
  """
  layout = _layout(target, mesh or {}, rules)
  parts = placement.placed(parts, layout)
  there = residency.Residency(
    weights(parts),
    residency.halves(parts.space),
    text_encoder,
    target.chip.usable,
    memory_budget,
  )
  phases, given, held = _conditions(parts, size, there, guided, layout, tell)
  tell("denoise")
  found, work, passes = _denoise(parts, size, given, guided, layout)
  phases["denoise"] = {"runs": steps, **found, "held": held}
  shape = latent_shape(parts, size)
  held += compiled.size(jax.ShapeDtypeStruct(shape, jnp.float32))
  tell("decode")
  left = there.room("decode", held)
  found = _autoencoder(parts, shape, left, layout, decode=True)
  phases["decode"] = {**found, "held": held}
  if text_encoder == "host":
    del phases["text"]
  seconds = roofline.estimate(target, work, [*layout.mesh.devices.flat])
  return {
    "latents": shape[1:],
    "weights": there.weights(),
    "phases": phases,
    "peak": there.peak(phases),
    "limit": target.chip.usable,
    "step": {
      "flops": work.flops,
      "traffic": work.traffic,
      "collectives": [row._asdict() for row in work.collectives],
      "passes": passes,
    },
    "seconds": vars(seconds) | {"total": seconds.total},
  }


def _layout(target, mesh, rules) -> placement.Layout:
  """Returns a `placement.Layout` on the first devices of a target."""
  used = len(target.devices)
  if -1 not in mesh.values():
    used = min(used, math.prod(mesh.values()))
  made = sharding.make_mesh(mesh, target.devices[:used])
  return placement.Layout(made, rules)


def latent_shape(parts: loading.Parts, size: sizes.Size) -> tuple[int, ...]:
  """Returns the shape of a video's latents, `b t h w c`."""
  return (1, *pipeline.DCVideoGen(parts).latent_shape(size))


def _conditions(parts, size, there, guided, layout, tell):
  """Measures the phases before the first step.

  Returns:
    The phases, their results as shapes, and the bytes of these results.
  """
  tell("text")
  found, text = _text(parts, layout)
  texts = 2 if guided else 1
  phases = {"text": {"runs": texts, **found, "held": 0}}
  given, held = {"text": text}, texts * compiled.size(text)
  if parts.task == "i2v":
    shape = latent_shape(parts, size)
    elsewhere = 0 if there.stays("image") else held
    tell("image")
    found, given["image"] = _image(parts, layout)
    phases["image"] = {"runs": 1, **found, "held": held - elsewhere}
    held += compiled.size(given["image"])
    tell("condition")
    left = there.room("condition", held - elsewhere)
    found = _autoencoder(parts, shape, left, layout, decode=False)
    phases["condition"] = {**found, "held": held - elsewhere}
    extra = (*shape[:-1], parts.space.temporal + parts.space.channels)
    given["extra"] = jax.ShapeDtypeStruct(extra, jnp.float32)
    held += compiled.size(given["extra"])
  return phases, given, held


def _text(parts, layout):
  module, variables = parts.texts.encoder
  tokens = jax.ShapeDtypeStruct((1, parts.texts.length), jnp.int32)
  tokens = compiled.place(layout.mesh, (tokens, tokens))
  with placement.in_force(layout):
    traced = conditions.encode_text.trace(module, variables, *tokens)
  figures = compiled.figures(traced, tokens)
  return compiled.report({"encode": (1, figures)}), traced.out_info


def _image(parts, layout):
  module, variables = parts.image_encoder
  images = 1 if parts.transformer.module.image_positions is None else 2
  side = module.image_size
  pixels = jax.ShapeDtypeStruct((images, side, side, 3), jnp.float32)
  pixels = compiled.place(layout.mesh, pixels)
  with placement.in_force(layout):
    traced = conditions.encode_images.trace(module, variables, pixels)
  figures = compiled.figures(traced, pixels)
  features = traced.out_info
  joined = (1, features.shape[0] * features.shape[1], features.shape[2])
  return (
    compiled.report({"encode": (1, figures)}),
    jax.ShapeDtypeStruct(joined, features.dtype),
  )


def trace_step(
  parts: loading.Parts,
  shape: tuple[int, ...],
  given: Mapping[str, jax.ShapeDtypeStruct],
  guided: bool,
  layout: placement.Layout,
) -> tuple[jax.stages.Traced, Any, int]:
  """Traces one solver step, as the pipeline compiles it.

  Args:
    parts: model whose variables are shapes with shardings.
    shape: shape of the latents, `b t h w c`.
    given: shapes of the conditions: "text", and for image to video also "image"
      and "extra".
    guided: whether classifier-free guidance is used.
    layout: mesh and sharding rules to compile for.

  Returns:
    The traced step, the shapes of its arguments without weights, and the number
    of calls of the transformer.

  Raises:
    errors.UserError: if the layout's devices cannot share the samples.
  """
  module, variables = parts.transformer
  batched = guided and denoise.batched_by_default(module, shape, layout)
  layout.check_batch(2 if batched else 1)
  schedule = parts.options.schedule(2)
  plan = sampler.plan(
    schedule, parts.options.solver, **parts.options.solver_options
  )
  noise = jax.ShapeDtypeStruct(shape, jnp.float32)
  carry = jax.eval_shape(functools.partial(sampler.start, plan=plan), noise)
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  row = jax.tree.map(jnp.asarray, sampler.row(plan, 0))
  moving = compiled.place(layout.mesh, (carry, row))
  fixed = compiled.place(layout.mesh, (scale, given, given if guided else None))
  step = denoise.jit_step(module, guided, batched, layout.everywhere)
  with placement.in_force(layout):
    traced = step.trace(*moving, variables, *fixed)
  return traced, (moving, fixed), 2 if guided and not batched else 1


def _denoise(parts, size, given, guided, layout):
  shape = latent_shape(parts, size)
  traced, arguments, passes = trace_step(parts, shape, given, guided, layout)
  program = compiled.compile_traced(traced)
  figures = compiled.of(traced, program, arguments)
  dtype = jnp.dtype(parts.dtype).name
  work = roofline.work(traced, program, layout.mesh.size, dtype)
  return compiled.report({"step": (1, figures)}), work, passes


def _autoencoder(parts, shape, left, layout, *, decode):
  """Measures encoding of the condition, or decoding."""
  space = parts.space
  module = space.module.clone(dtype=jnp.float32)
  if decode:
    module = space.decoder(parts.dtype)
  pixels = [n * space.spatial for n in shape[2:4]]
  if isinstance(space, spaces.WanVAELatents):
    found = autoencoder.measure_wan(
      module, space.variables, *pixels, shape[1], layout.mesh, decode=decode
    )
    return {"runs": 1, **found}
  frames = shape[1] * space.temporal
  streamed = frames > module.chunk_frames
  try:
    plan = bands.plan(
      module,
      *pixels,
      left,
      decode=decode,
      streamed=streamed,
      devices=sharding.num_shards(layout.mesh, "columns"),
      platform=layout.mesh.devices.flat[0].platform,
    )
  except errors.UserError as e:
    raise compiled.TooLarge(
      f"{'decoding' if decode else 'the condition'}: {e}"
    ) from e
  found = autoencoder.measure(
    module,
    space.variables,
    *pixels,
    plan,
    layout.mesh,
    decode=decode,
    streamed=streamed,
  )
  runs = -(-frames // module.chunk_frames)
  return {"runs": runs, "plan": vars(plan), **found}
