"""Optimiser, learning-rate schedule and parameter average from a config."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcvideogen_jax import errors, tree


def learning_rate(config: Mapping[str, Any], steps: int) -> optax.Schedule:
  """Linear warm-up from zero, then "cosine" down to `final` or "constant".

  Args:
    config: "lr", "warmup" (steps), "schedule", "final" (fraction of lr).
    steps: of the whole run.

  Raises:
    errors.UserError: for an unknown schedule or a warm-up that outlasts the
      run.
  """
  lr, warmup = config["lr"], config["warmup"]
  if not 0 <= warmup <= steps:
    raise errors.UserError(
      f"optim.warmup must be within 0..{steps} steps, found {warmup}"
    )
  rest = max(1, steps - warmup)
  after = {
    "cosine": lambda: optax.cosine_decay_schedule(lr, rest, config["final"]),
    "constant": lambda: optax.constant_schedule(lr),
  }
  if config["schedule"] not in after:
    raise errors.UserError(
      f"optim.schedule must be one of {', '.join(after)}, "
      f"found {config['schedule']!r}"
    )
  ramp = optax.linear_schedule(0.0, lr, max(1, warmup))
  return optax.join_schedules([ramp, after[config["schedule"]]()], [warmup])


def _scale(config: Mapping[str, Any]) -> optax.GradientTransformation:
  """The update direction before decay and learning rate."""
  b1, b2 = config["betas"]
  rows = {
    "adamw": lambda: optax.scale_by_adam(b1, b2, config["eps"]),
    "sgd": optax.identity,
  }
  if config["name"] not in rows:
    raise errors.UserError(
      f"optim.name must be one of {', '.join(rows)}, found {config['name']!r}"
    )
  return rows[config["name"]]()


def build(
  config: Mapping[str, Any], steps: int
) -> optax.GradientTransformation:
  """Clip by global norm, AdamW (or SGD) with masked decay, schedule.

  Args:
    config: "name", "lr", "warmup", "schedule", "final", "betas", "eps",
      "clip" (0 for none), "decay", and "decay_mask": ordered (regular
      expression over parameter names, bool).
    steps: of the whole run.

  Raises:
    errors.UserError: for an unknown name or schedule; `init` raises it for a
      parameter that no rule of the mask covers.
  """
  clip = [optax.clip_by_global_norm(config["clip"])] if config["clip"] else []
  return optax.chain(
    *clip,
    _scale(config),
    optax.add_decayed_weights(
      config["decay"], lambda p: tree.match_tree(config["decay_mask"], p)
    ),
    optax.scale_by_learning_rate(learning_rate(config, steps)),
  )


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Exponential average of `params`, faster in the first steps.

  The decay of the update after step n (from 0) is
  min(decay, (1 + n) / (10 + n)), so the random start is soon forgotten.
  """
  n = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1 + n) / (10 + n))
  return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
