"""Optimiser, learning-rate schedule and EMA from a config."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcvideogen_jax import errors, tree

UpdateEMA = Callable[[Any, Any, jax.Array], Any]


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
  decay = errors.choose("optim.schedule", config["schedule"], after)()
  ramp = optax.linear_schedule(0.0, lr, max(1, warmup))
  return optax.join_schedules([ramp, decay], [warmup])


def build(
  config: Mapping[str, Any], steps: int
) -> optax.GradientTransformation:
  """Clip by global norm, AdamW (or SGD) with masked decay, schedule, scale.

  A parameter's scale multiplies its whole update after all else, decay too, as
  if its learning rate were another: what parameter groups do in PyTorch.
  Gradients are clipped before, by the norm of all, and the moments and names of
  the state do not depend on it.

  Args:
    config: "name", "lr", "warmup", "schedule", "final", "betas", "eps",
      "clip" (0 for none), "decay"; and, ordered by (regular expression over
      names of the parameters that train, value), of which the first that
      matches holds: "decay_mask" with bools, and "lr_scale" with positive
      numbers, 1 for all where it is missing.
    steps: of the whole run.

  Raises:
    errors.UserError: for an unknown name or schedule; `init` raises it for a
      parameter that no rule covers, and a rule of "lr_scale" that matches none.
  """
  clip = [optax.clip_by_global_norm(config["clip"])] if config["clip"] else []
  directions = {
    "adamw": optax.scale_by_adam(*config["betas"], config["eps"]),
    "sgd": optax.identity(),
  }
  return optax.chain(
    *clip,
    errors.choose("optim.name", config["name"], directions),
    optax.add_decayed_weights(
      config["decay"], lambda p: tree.match_tree(config["decay_mask"], p)
    ),
    _scaled(
      optax.scale_by_learning_rate(learning_rate(config, steps)),
      config.get("lr_scale", ((".*", 1.0),)),
    ),
  )


def _scaled(
  inner: optax.GradientTransformation, rules: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
  """`inner` with its updates multiplied, and its state as it is."""

  def init(params):
    names = tree.match(rules, tree.names(params))
    for pattern, _ in rules:
      if not any(re.fullmatch(pattern, name) for name in names):
        raise errors.UserError(
          f"optim.lr_scale: {pattern!r} matches none of the parameters that "
          f"train, such as {next(iter(names))}"
        )
    return inner.init(params)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, state, params)
    factors = tree.match_tree(rules, updates)
    return jax.tree.map(lambda u, factor: factor * u, updates, factors), state

  return optax.GradientTransformation(init, update)


def ema(config: Mapping[str, Any] | None) -> UpdateEMA | None:
  """How an exponential moving average (EMA) of parameters follows them.

  Args:
    config: "decay", "ramp" and "steps"; None or "decay" 0 for no EMA. The
      decay of the n-th update, n from 1, grows so that the start is soon
      forgotten. "ratio": min(decay, n / (9 + n)); "exponential":
      decay * (1 - exp(-n / steps)), that of DC-Gen (commit 562077c).

  Returns:
    (EMA, parameters, steps before this one) -> EMA.

  Raises:
    errors.UserError: for an unknown ramp, or numbers out of range.
  """
  if not config or not config["decay"]:
    return None
  decay, steps = config["decay"], config["steps"]
  ramps = {
    "ratio": lambda n: jnp.minimum(decay, n / (9 + n)),
    "exponential": lambda n: -decay * jnp.expm1(-n / steps),
  }
  ramp = errors.choose("ema.ramp", config["ramp"], ramps)
  if not (0 < decay < 1 and steps > 0):
    raise errors.UserError(
      "ema.decay must be within 0..1 and ema.steps positive, found "
      f"{decay} and {steps}"
    )

  def update(average, params, step):
    d = ramp(step.astype(jnp.float32) + 1)
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, average, params)

  return update
