"""A step of Wan's transformer, beside diffusers' `WanTransformer3DModel`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.sides import Side
from dcvideogen_jax import errors

NEEDS = {"jax": ("jax",), "torch": ("torch", "diffusers")}
DTYPES = ("float32", "bfloat16")
_TEXT_TOKENS = 512
_TIMESTEP = 700.0


def request(
  fields: Mapping[str, Any],
  latents: Sequence[int],
  dtype: str = "float32",
  text_tokens: int = _TEXT_TOKENS,
) -> dict[str, Any]:
  """Returns what both sides take; and "tokens" and "weight_bytes", to report.

  Args:
    fields: the fields of `WanDiT`, of a text-to-video model.
    latents: frames, rows and columns of the latents.
    dtype: of weights and computation, one of `DTYPES`.
    text_tokens: tokens of the text.

  Raises:
    errors.UserError: if the fields are not those of a text-to-video
      transformer, or the latents do not fit it.
  """
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api, matching

  kind = api.KINDS["wan_dit"]
  if dtype not in DTYPES:
    raise errors.UserError(
      f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}"
    )
  both = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
  try:
    module = kind.build(fields, **both)
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"the configuration of wan_dit: {e}") from e
  if module.image_width is not None:
    raise errors.UserError(
      "expected a text-to-video model, found one that takes images too"
    )
  if any(n < 1 or n % p for n, p in zip(latents, module.patch, strict=True)):
    raise errors.UserError(
      "expected frames, rows and columns of latents that are multiples of the"
      f" patch {module.patch}, found {tuple(latents)}"
    )
  params = jax.tree.leaves(matching.parameters("wan_dit", module))
  sizes = zip(latents, module.patch, strict=True)
  return {
    "fields": {**fields},
    "config": kind.configs["diffusers"](api.config_of(module)),
    "shapes": inputs.torch_shapes("wan_dit", "diffusers", module),
    "dtype": dtype,
    "latents": [1, *latents, module.in_channels],
    "text": [1, text_tokens, module.text_width],
    "tokens": int(np.prod([n // p for n, p in sizes])),
    "weight_bytes": sum(x.size * x.dtype.itemsize for x in params),
  }


def jax(request: Mapping[str, Any]) -> Side:
  """Builds the module, and compiles a step."""
  import jax
  import jax.numpy as jnp

  from dcvideogen_jax.convert import api

  dtype = jnp.dtype(request["dtype"])
  module = api.KINDS["wan_dit"].build(
    request["fields"], dtype=dtype, param_dtype=dtype
  )
  params = inputs.params("wan_dit", "diffusers", module, request["shapes"])
  latents, text = inputs.normal(request["latents"], request["text"])
  arguments = jax.block_until_ready(
    (
      {"params": params},
      jnp.asarray(latents),
      jnp.asarray([_TIMESTEP], jnp.float32),
      jnp.asarray(text),
    )
  )
  step, seconds, work = inputs.compiled(jax.jit(module.apply), *arguments)
  return Side(
    {"step": lambda: np.asarray(step(*arguments), np.float32)},
    seconds,
    lambda: {"step": work()},
  )


def torch(request: Mapping[str, Any]) -> Side:
  """Builds diffusers' model."""
  import torch

  dtype = getattr(torch, request["dtype"])
  model = peer(request["config"], request["shapes"], dtype)
  latents, text = inputs.normal(request["latents"], request["text"])
  x = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()).to(dtype)
  text = torch.from_numpy(text).to(dtype)
  time = torch.tensor([_TIMESTEP])

  def step():
    with torch.inference_mode():
      (velocity,) = model(x, time, text, return_dict=False)
    return np.moveaxis(velocity.float().numpy(), 1, -1)

  return Side({"step": step})


def peer(
  config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], dtype: Any
) -> Any:
  """Returns diffusers' transformer with the random weights of `inputs`."""
  import torch
  from diffusers import WanTransformer3DModel

  config = {k: v for k, v in config.items() if k[0] != "_"}
  with torch.device("meta"):
    model = WanTransformer3DModel(**config)
  # RoPE tables are no weights, so no state dict restores them from "meta".
  model.rope = type(model.rope)(
    config["attention_head_dim"],
    config["patch_size"],
    config["rope_max_seq_len"],
  )
  kept = {*model._keep_in_fp32_modules}
  weights = {
    name: x.to(torch.float32 if kept & {*name.split(".")} else dtype)
    for name, x in inputs.torch_weights(shapes).items()
  }
  model.load_state_dict(weights, assign=True)
  return model
