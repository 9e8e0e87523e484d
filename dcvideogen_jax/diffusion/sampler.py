"""Samples latents from noise with a model, a schedule and a solver.

    plan = sampler.plan(flow.schedule(50, shift=5.0), "unipc")

    # One program for the whole loop,
    latents = jax.jit(functools.partial(sampler.sample, model))(
      noise, plan, weights, text)

    # or one program per step, with a report after each.
    step = sampler.jit_step(model)
    for i, latents in sampler.stream(step, noise, plan, weights, text):
      print(f"{i + 1} of {plan.steps}")

A model is a callable `(x, t, *inputs) -> velocity`. Pass everything it needs
besides the sample (weights, text embeddings, a guidance scale) as `inputs`,
pytrees of arrays. Arrays in a closure become constants of the jitted program.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt32

from dcvideogen_jax.arrays import Array
from dcvideogen_jax.diffusion import flow, solvers

Model = Callable[..., Array]


class SamplingPlan(NamedTuple):
  """The timesteps and solver coefficients of a sampling run.

  A pytree of float32 arrays with a leading axis of steps. `row(plan, i)` is the
  part of one step; its shapes do not depend on the number of steps, the shift
  or the grid.

  Attributes:
    timesteps: (steps,) inputs of the network.
    coefficients: the solver's coefficients.
  """

  timesteps: Any
  coefficients: solvers.Coefficients

  @property
  def steps(self) -> int:
    """The number of steps, each with one call of the model."""
    return len(self.timesteps)


class Carry(NamedTuple):
  """The float32 latents and the solver's state, carried from step to step."""

  x: Array
  state: solvers.State


def plan(
  schedule: flow.Schedule, solver: str = "unipc", **options: Any
) -> SamplingPlan:
  """Prepares a sampling run.

  Args:
    schedule: noise levels.
    solver: a name in `solvers.SOLVERS`.
    **options: options of the solver, such as `flow.Options.solver_options`.

  Raises:
    errors.UserError: as `solvers.coefficients` does.
  """
  return SamplingPlan(
    schedule.timesteps.astype(np.float32),
    solvers.coefficients(solver, schedule.sigmas, **options),
  )


def row(plan: SamplingPlan, i: int | Int[Array, ""]) -> SamplingPlan:
  """Returns the plan's part for step `i`, possibly traced if the plan is."""
  return jax.tree.map(lambda x: x[i], plan)


def start(
  noise: Float[Array, "b ..."],
  plan: SamplingPlan,
  keys: UInt32[Array, "b n"] | None = None,
) -> Carry:
  """Returns the first step's carry, with a float32 copy of the noise.

  The copy has the sharding of the noise.

  Args:
    noise: standard normal.
    plan: from the function `plan`.
    keys: data of a random key per sample, for solvers that draw noise in each
      step; others ignore them.

  Raises:
    ValueError: if such a solver gets no keys.
  """
  x = jnp.array(noise, jnp.float32, copy=True)
  return Carry(x, solvers.init(plan.coefficients, x, keys))


def advance(
  model: Model, carry: Carry, row: SamplingPlan, *inputs: Any
) -> Carry:
  """Takes one step: calls the model once and applies the solver.

  Args:
    model: callable `(x, t, *inputs) -> velocity`; x float32, t "b" float32.
    carry: from the previous step, or from `start`.
    row: the step's part of the plan, from the function `row`.
    *inputs: passed on to the model.
  """
  t = jnp.broadcast_to(row.timesteps, carry.x.shape[:1])
  v = model(carry.x, t, *inputs)
  with jax.named_scope("solver"):
    return Carry(*solvers.step(row.coefficients, carry.state, carry.x, v))


def sample(
  model: Model,
  noise: Float[Array, "b ..."],
  plan: SamplingPlan,
  *inputs: Any,
  keys: UInt32[Array, "b n"] | None = None,
) -> Float32[Array, "b ..."]:
  """Runs all steps in one `lax.scan`; jit it, or call it in a jitted function.

  Args:
    model: callable `(x, t, *inputs) -> velocity`.
    noise: standard normal, in the latents' shape, channels last.
    plan: from the function `plan`; jit compiles a program per number of steps.
    *inputs: passed on to the model.
    keys: as for `start`.

  Returns:
    The latents after the last step.
  """

  def body(carry: Carry, row: SamplingPlan) -> tuple[Carry, None]:
    return advance(model, carry, row, *inputs), None

  return jax.lax.scan(body, start(noise, plan, keys), plan)[0].x


def jit_step(model: Model, out_shardings: Any = None) -> Callable[..., Carry]:
  """Returns a jitted step, `(carry, row, *inputs) -> carry`.

  The step donates its carry. Keep the function: it is compiled once for its
  shapes, and then serves every step of every plan with the same solver and
  order. It can be lowered and compiled ahead like any jitted function.

  Args:
    model: as for `advance`.
    out_shardings: sharding of the carry, as for `jax.jit`: one for all of its
      arrays, or None.
  """

  def step(carry: Carry, row: SamplingPlan, *inputs: Any) -> Carry:
    return advance(model, carry, row, *inputs)

  return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def stream(
  step: Callable[..., Carry],
  noise: Float[Array, "b ..."],
  plan: SamplingPlan,
  *inputs: Any,
  where: Any = None,
  keys: UInt32[Array, "b n"] | None = None,
) -> Iterator[tuple[int, Float32[Array, "b ..."]]]:
  """Runs all steps in a loop on the host and yields the latents of each.

  The loop waits for each step, so the time between two yields is the duration
  of a step.

  Args:
    step: from `jit_step`, jitted or compiled ahead.
    noise: as for `sample`; it is copied and not donated.
    plan: from the function `plan`.
    *inputs: passed on to the model.
    where: sharding of each step's row of the plan; None is the default device.
    keys: as for `start`.

  Yields:
    (i, latents) with i from 0. All latents but the last are donated to the next
    step: copy them to keep them.
  """
  carry = start(noise, plan, keys)
  for i in range(plan.steps):
    carry = step(carry, jax.device_put(row(plan, i), where), *inputs)
    yield i, jax.block_until_ready(carry.x)
