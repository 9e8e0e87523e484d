"""From noise to latents: a model, a schedule and a solver, step by step.

    plan = sampler.plan(flow.schedule(50, shift=5.0), "unipc")

    # One program for the whole loop,
    latents = jax.jit(functools.partial(sampler.sample, model))(
      noise, plan, weights, text)

    # or one per step, which reports in between.
    step = sampler.jit_step(model)
    for i, latents in sampler.stream(step, noise, plan, weights, text):
      print(f"{i + 1} of {plan.steps}")

A model is a callable `(x, t, *inputs) -> velocity`. Whatever it needs besides
the sample (weights, text, a guidance scale) goes through `inputs`, pytrees of
arrays, and not through a closure: jit would make constants of that.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dcvideogen_jax.diffusion import flow, solvers

Model = Callable[..., Array]


class SamplingPlan(NamedTuple):
  """All numbers of a sampling run: float32 arrays with a leading axis of steps.

  A pytree; `row(plan, i)` is one step's part of it, which has the same shapes
  whatever the number of steps, the shift and the grid.
  """

  timesteps: Any
  coefficients: solvers.Coefficients

  @property
  def steps(self) -> int:
    return len(self.timesteps)


class Carry(NamedTuple):
  """What goes from step to step: float32 latents and the solver's memory."""

  x: Array
  state: solvers.State


def plan(
  schedule: flow.Schedule, solver: str = "unipc", **options: Any
) -> SamplingPlan:
  """Prepares a sampling run.

  Args:
    schedule: noise levels.
    solver: a name in `solvers.SOLVERS`.
    **options: of that solver, such as `flow.Options.solver_options`.

  Raises:
    errors.UserError: as `solvers.coefficients`.
  """
  return SamplingPlan(
    schedule.timesteps.astype(np.float32),
    solvers.coefficients(solver, schedule.sigmas, **options),
  )


def row(plan: SamplingPlan, i: int | Int[Array, ""]) -> SamplingPlan:
  """The part of step `i`, which may be traced if the plan is."""
  return jax.tree.map(lambda x: x[i], plan)


def start(noise: Float[Array, "b ..."], plan: SamplingPlan) -> Carry:
  """What the first step gets: a float32 copy of the noise, sharded alike."""
  x = jnp.array(noise, jnp.float32, copy=True)
  return Carry(x, solvers.init(plan.coefficients, x))


def advance(
  model: Model, carry: Carry, row: SamplingPlan, *inputs: Any
) -> Carry:
  """One step: the model is called once, the solver moves on.

  Args:
    model: callable `(x, t, *inputs) -> velocity`; x float32, t "b" float32.
    carry: of the previous step, or `start`.
    row: as of `row`.
    *inputs: passed on.
  """
  t = jnp.broadcast_to(row.timesteps, carry.x.shape[:1])
  v = model(carry.x, t, *inputs)
  with jax.named_scope("solver"):
    return Carry(*solvers.step(row.coefficients, carry.state, carry.x, v))


def sample(
  model: Model, noise: Float[Array, "b ..."], plan: SamplingPlan, *inputs: Any
) -> Float32[Array, "b ..."]:
  """The whole run as one loop, to be jitted or used inside a jitted function.

  Args:
    model: callable `(x, t, *inputs) -> velocity`.
    noise: standard normal, in the latents' shape, channels last.
    plan: as of `plan`; another number of steps is another program.
    *inputs: passed on to the model.

  Returns:
    The latents after the last step.
  """

  def body(carry: Carry, row: SamplingPlan) -> tuple[Carry, None]:
    return advance(model, carry, row, *inputs), None

  return jax.lax.scan(body, start(noise, plan), plan)[0].x


def jit_step(model: Model, out_shardings: Any = None) -> Callable[..., Carry]:
  """One jitted step, `(carry, row, *inputs) -> carry`; donates the carry.

  Keep it: it is compiled once for its shapes, and then serves every step of
  every plan of the same solver and order. It can be lowered and compiled ahead
  like any jitted function.

  Args:
    model: as for `advance`.
    out_shardings: of the carry, as for `jax.jit`; one for all of it, or None.
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
) -> Iterator[tuple[int, Float32[Array, "b ..."]]]:
  """The whole run as a loop on the host that hands out every step's latents.

  Waits for each step, so that the time between two of them is what it took.

  Args:
    step: as of `jit_step`, or that compiled ahead.
    noise: as for `sample`; left intact.
    plan: as of `plan`.
    *inputs: passed on to the model.
    where: a sharding for each step's row of the plan; None is one device.

  Yields:
    (i, latents) with i from 0. All but the last latents are donated to the next
    step: copy them to keep them.
  """
  carry = start(noise, plan)
  for i in range(plan.steps):
    carry = step(carry, jax.device_put(row(plan, i), where), *inputs)
    yield i, jax.block_until_ready(carry.x)
