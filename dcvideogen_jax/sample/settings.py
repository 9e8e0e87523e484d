"""Checks a sampling config of `presets`, and turns it into arguments."""

from typing import Any

import jax.numpy as jnp

from dcvideogen_jax import errors
from dcvideogen_jax.data import tables, tokenize
from dcvideogen_jax.diffusion import flow, sampler
from dcvideogen_jax.ops import attention
from dcvideogen_jax.sample import arguments, loading, request_list, sizes

DTYPES = {None: None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check(c: Any) -> None:
  """Refuses, before anything is loaded, a config that would fail later.

  Raises:
    errors.UserError: names the field that does not fit.
  """
  if c.height is not None or c.width is not None:
    sizes.checked(c.frames, c.height, c.width)
  else:
    sizes.checked(c.frames, c.area, 1)
  if c.size_rule not in sizes.RULES:
    raise errors.UserError(
      f"config.size_rule must be {' or '.join(sizes.RULES)}, found "
      f"{c.size_rule!r}"
    )
  arguments.condition_tail(c.condition_tail, c.size_rule)
  if c.attention is not None:
    attention.require(c.attention)
  if c.dtype not in DTYPES:
    raise errors.UserError(
      f"config.dtype must be float32 or bfloat16, found {c.dtype!r}"
    )
  loading.check_weights(c.weights)
  if c.levels is not None and (c.grid or c.shift) is not None:
    raise errors.UserError(
      "config.levels are the noise levels themselves: they go together with"
      " neither config.grid nor config.shift"
    )
  options = solver_options(loading.DEFAULT_OPTIONS, c)
  if c.shift is not None:
    options = options._replace(shift=c.shift)
  schedule = options.schedule(arguments.steps(c.steps))
  sampler.plan(schedule, options.solver, **options.solver_options)
  if c.negative_prompt is not None:
    tables.require_text(c.negative_prompt, "config.negative_prompt")


def solver_options(options: flow.Options, c: Any) -> flow.Options:
  """Returns the checkpoint's solver and grid, with the config's changes."""
  if c.solver not in (None, options.solver):
    options = options._replace(solver=c.solver, solver_options={})
  if c.levels is not None:
    return options._replace(levels=tuple(c.levels))
  return options if c.grid is None else options._replace(grid=c.grid)


def negative_prompt(default: str, c: Any, request: Any) -> str:
  """Returns the negative prompt of a request.

  It is the request's own if it has one, otherwise that of the config, otherwise
  that of the model.

  Args:
    default: that of the model.
    c: the config.
    request: of `request_list`.
  """
  text = request.negative_prompt
  text = c.negative_prompt if text is None else text
  text = default if text is None else text
  return tokenize.NEGATIVE_PROMPTS.get(text, text)


def of_request(
  pipeline: Any, c: Any, request: request_list.Request
) -> dict[str, Any]:
  """Returns the arguments that `generate` and `generate_stream` share.

  Args:
    pipeline: `pipeline.DCVideoGen`.
    c: the config.
    request: the video to make.
  """
  return {
    "negative_prompt": negative_prompt(pipeline.negative_prompt(), c, request),
    "image": request_list.read_image(request.image),
    "height": c.height,
    "width": c.width,
    "area": c.area,
    "frames": c.frames,
    "steps": c.steps,
    "guidance_scale": c.guidance_scale,
    "batched": c.batched,
    "shift": c.shift,
    "options": solver_options(pipeline.parts.options, c),
    "seed": request.seed,
  }
