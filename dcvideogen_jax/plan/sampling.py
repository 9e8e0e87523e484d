"""Compiles sampling for a device that is not there, everything resident.

The programs are those of `sample.pipeline`, for one prompt: text encoder, image
encoder, encoder of the condition, one step of the solver, decoder.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dcvideogen_jax import errors
from dcvideogen_jax.data import tokenize
from dcvideogen_jax.diffusion import sampler
from dcvideogen_jax.models import bands
from dcvideogen_jax.plan import compiled, decode, encode
from dcvideogen_jax.sample import (
  conditions,
  denoise,
  latents,
  loading,
  pipeline,
  sizes,
)

_GIB = 2**30


class TooLarge(Exception):
  """Something cannot fit, whatever the plan; the message says what."""


def parts(variant: str, dtype: jnp.dtype) -> loading.Parts:
  """What `loading.load` gives for a published model, with shapes for weights.

  Args:
    variant: a key of `wan_dit.VARIANTS`.
    dtype: bfloat16 or float32, as for `loading.load`.
  """
  dtype = jnp.dtype(dtype)
  both = {"dtype": dtype, "param_dtype": dtype}
  transformer = compiled.part("wan_dit", variant, **both)
  if dtype == jnp.bfloat16:
    # What attention chooses on a GPU; here it would choose for this machine.
    module = transformer.module.clone(attention="cudnn")
    transformer = transformer._replace(module=module)
  if variant.startswith("dc-"):
    space = latents.Deep(*compiled.part("dc_ae_v", "f32t4c32", **both))
  else:
    space = latents.Wan(*compiled.part("wan_vae", "wan2.1"))
  encoder = compiled.part("umt5", "umt5_xxl", **both)
  seen = transformer.module.image_width is not None
  return loading.Parts(
    transformer,
    space,
    loading.Texts(None, encoder),
    compiled.part("clip_vision", "vit_h_14") if seen else None,
    dtype=dtype,
  )


def weights(parts: loading.Parts) -> dict[str, int]:
  """Bytes of each part's weights."""
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
  limit: int,
  device: jax.Device,
  *,
  guided: bool = True,
  steps: int = 50,
) -> dict[str, Any]:
  """Memory and work of one video.

  Args:
    parts: as of `parts`.
    size: of the video.
    limit: bytes that jax has on the device. Encoding and decoding are planned
      with the share of what is left of it that the pipeline takes.
    device: from `hardware.gpu`.
    guided: whether there is classifier-free guidance.
    steps: of the solver.

  Returns:
    "latents": their frames, rows, columns and channels. "weights": as of
    `weights`. "phases": by name, in order, "runs" and a `compiled.report` of
    one run, with "held", what earlier phases made, as if all of it stayed, and
    "plan" where there is one. "peak": all weights and the largest phase.
    "limit": as given. "step": "flops" of one step, the "bytes" that it moves at
    the least, and "passes" through the transformer.

  Raises:
    TooLarge: if the weights do not fit, or what they leave is too little for
      any plan.
  """
  resident = weights(parts)
  left = limit - sum(resident.values())
  if left <= 0:
    raise TooLarge(
      f"the weights alone take {sum(resident.values()) / _GIB:.1f} of "
      f"{limit / _GIB:.1f} GiB"
    )
  shape = (1, *pipeline.DCVideoGen(parts).latent_shape(size))
  texts = 2 if guided else 1
  found, text = _text(parts, device)
  phases = {"text": {"runs": texts, **found, "held": 0}}
  given, held = {"text": text}, texts * compiled.size(text)
  if parts.task == "i2v":
    found, given["image"] = _image(parts, device)
    phases["image"] = {"runs": 1, **found, "held": held}
    held += compiled.size(given["image"])
    found = _autoencoder(parts, shape, left - held, device, encode)
    phases["condition"] = {**found, "held": held}
    extra = (*shape[:-1], parts.space.temporal + parts.space.channels)
    given["extra"] = jax.ShapeDtypeStruct(extra, jnp.float32)
    held += compiled.size(given["extra"])
  found, step = _denoise(parts, shape, given, guided, device)
  phases["denoise"] = {"runs": steps, **found, "held": held}
  held += compiled.size(jax.ShapeDtypeStruct(shape, jnp.float32))
  found = _autoencoder(parts, shape, left - held, device, decode)
  phases["decode"] = {**found, "held": held}
  largest = max(phase["bytes"] + phase["held"] for phase in phases.values())
  return {
    "latents": shape[1:],
    "weights": resident,
    "phases": phases,
    "peak": sum(resident.values()) + largest,
    "limit": limit,
    "step": step,
  }


def _text(parts, device):
  module, variables = parts.texts.encoder
  tokens = jax.ShapeDtypeStruct((1, tokenize.LENGTH), jnp.int32)
  tokens = compiled.place(device, (tokens, tokens))
  variables = compiled.place(device, variables)
  traced = conditions.encode_text.trace(module, variables, *tokens)
  figures = compiled.figures(traced, tokens)
  return compiled.report({"encode": (1, figures)}), traced.out_info


def _image(parts, device):
  module, variables = parts.image_encoder
  variables = compiled.place(device, variables)
  images = 1 if parts.transformer.module.image_positions is None else 2
  side = module.image_size
  pixels = jax.ShapeDtypeStruct((images, side, side, 3), jnp.float32)
  pixels = compiled.place(device, pixels)
  traced = conditions.encode_images.trace(module, variables, pixels)
  figures = compiled.figures(traced, pixels)
  features = traced.out_info
  joined = (1, features.shape[0] * features.shape[1], features.shape[2])
  return (
    compiled.report({"encode": (1, figures)}),
    jax.ShapeDtypeStruct(joined, features.dtype),
  )


def _denoise(parts, shape, given, guided, device):
  module, variables = parts.transformer
  batched = guided and pipeline.batched_by_default(module, shape)
  model = functools.partial(denoise.velocity, module, guided, batched)
  schedule = parts.options.schedule(2)
  plan = sampler.plan(
    schedule, parts.options.solver, **parts.options.solver_options
  )
  noise = jax.ShapeDtypeStruct(shape, jnp.float32)
  carry = jax.eval_shape(functools.partial(sampler.start, plan=plan), noise)
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  row = jax.tree.map(jnp.asarray, sampler.row(plan, 0))
  moving = compiled.place(device, (carry, row))
  fixed = compiled.place(device, (scale, given, given if guided else None))
  params = compiled.place(device, variables["params"])
  traced = sampler.jit_step(model).trace(*moving, params, *fixed)
  figures = compiled.figures(traced, (moving, fixed))
  passes = 2 if guided and not batched else 1
  step = {
    "flops": figures["flops"],
    "bytes": passes * compiled.size(params)
    + figures["arguments"]
    + figures["outputs"],
    "passes": passes,
  }
  return compiled.report({"step": (1, figures)}), step


def _autoencoder(parts, shape, left, device, task):
  """Encodes the condition or decodes, as `task` is `encode` or `decode`."""
  space = parts.space
  decoding = task is decode
  module = space.module.clone(dtype=jnp.float32)
  if decoding:
    module = space.decoder(parts.dtype)
  pixels = [n * space.spatial for n in shape[2:4]]
  if isinstance(space, latents.Wan):
    found = task.measure_wan(module, space.variables, *pixels, shape[1], device)
    return {"runs": 1, **found}
  frames = shape[1] * space.temporal
  streamed = frames > module.chunk_frames
  try:
    plan = bands.plan(
      module,
      *pixels,
      max(0, pipeline.SHARE * left),
      decode=decoding,
      streamed=streamed,
    )
  except errors.UserError as e:
    raise TooLarge(f"{'decoding' if decoding else 'the condition'}: {e}") from e
  found = task.measure(
    module, space.variables, *pixels, plan, device, streamed=streamed
  )
  runs = -(-frames // module.chunk_frames)
  return {"runs": runs, "plan": vars(plan), **found}
