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
  """Builds a schedule: linear warm-up from zero, then cosine or constant.

  Args:
    config: "lr", "warmup" (steps), "schedule" ("cosine" or "constant"), and
      "final", the fraction of "lr" at the end of the cosine.
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


# Which optimiser moves a leaf: the first pattern that matches its name.
_PLAYERS = (
  ("discriminator/state/.*", "carried"),
  ("discriminator/.*", "discriminator"),
  (".*", "generator"),
)


def two_players(
  config: Mapping[str, Any], other: Mapping[str, Any] | None, steps: int
) -> optax.GradientTransformation:
  """Builds the optimiser of a run, and a discriminator's beside it.

  Each clips by the norm of its own gradients. Values that the discriminator
  carries from step to step move by minus their gradient.

  Args:
    config: of the run's optimiser, as for `build`.
    other: of the discriminator's; None for a run without one.
    steps: of the whole run.

  Raises:
    errors.UserError: as `build` does.
  """
  if not other:
    return build(config, steps)
  return optax.partition(
    {
      "generator": build(config, steps),
      "discriminator": build(other, steps),
      "carried": optax.sgd(1.0),
    },
    lambda params: tree.match_tree(_PLAYERS, params),
  )


def norms(gradients: Any) -> dict[str, jax.Array]:
  """Returns the norm of a run's gradients, and of a discriminator's."""
  leaves = tree.flatten(gradients)
  players = tree.match(_PLAYERS, leaves)
  found = {}
  for name, key in (
    ("generator", "grad_norm"),
    ("discriminator", "d_grad_norm"),
  ):
    own = [x for leaf, x in leaves.items() if players[leaf] == name]
    if own:
      found[key] = optax.tree.norm(own)
  return found


def build(
  config: Mapping[str, Any], steps: int
) -> optax.GradientTransformation:
  """Builds AdamW or SGD with clipping, masked weight decay and a schedule.

  The "lr_scale" of a parameter multiplies its final update, weight decay
  included, like the learning rate of a parameter group in PyTorch. Clipping
  comes first and uses the global norm of all gradients. The moments and the
  names in the optimiser's state do not depend on the scale.

  Args:
    config: "name" ("adamw" or "sgd"), "lr", "warmup", "schedule", "final",
      "betas", "eps", "clip" (the largest global norm; 0 for no clipping) and
      "decay". Two ordered lists of (regular expression over the names of
      trainable parameters, value), in which the first match holds:
      "decay_mask" with bools, and "lr_scale" with positive numbers, which may
      be missing and is then 1 for all parameters.
    steps: of the whole run.

  Raises:
    errors.UserError: for an unknown name or schedule. The optimiser's `init`
      raises it for a parameter that no rule covers, and for a rule of
      "lr_scale" that matches no parameter.
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
  """Multiplies the updates of `inner` by factors; its state is unchanged."""

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
  """Builds the update of the parameters' exponential moving average (EMA).

  The decay grows with the number n = 1, 2, ... of the update, so that the EMA
  soon forgets the initial parameters. Ramp "ratio": min(decay, n / (9 + n)).
  Ramp "exponential": decay * (1 - exp(-n / steps)), as in DC-Gen (commit
  562077c).

  Args:
    config: "decay", "ramp" and "steps"; None or "decay" 0 for no EMA.

  Returns:
    (EMA, parameters, steps before this one) -> EMA; None for no EMA.

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
