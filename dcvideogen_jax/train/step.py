"""From a config to a compiled step, on any mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding
from dcvideogen_jax.train import optim, tasks
from dcvideogen_jax.train import state as state_lib


class Plan(NamedTuple):
  """What a config describes, before anything is allocated.

  `state` is a tree of `jax.ShapeDtypeStruct`s with their shardings.
  """

  task: tasks.Task
  optimiser: optax.GradientTransformation
  mesh: Mesh
  create: Callable[[], state_lib.TrainState]
  state: state_lib.TrainState


def plan(config: Mapping[str, Any]) -> Plan:
  """Builds the task, the optimiser, the mesh and the sharded abstract state.

  Raises:
    errors.UserError: for anything in the config that does not fit.
  """
  if config["task"] not in tasks.TASKS:
    raise errors.UserError(
      f"task must be one of {', '.join(tasks.TASKS)}, found {config['task']!r}"
    )
  task = tasks.TASKS[config["task"]](config)
  optimiser = optim.build(config["optim"], config["steps"])
  mesh = sharding.make_mesh(config["mesh"])
  create = functools.partial(
    state_lib.create, task, optimiser, config["seed"], bool(config["ema"])
  )
  abstract = jax.eval_shape(create)
  target = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract,
    sharding.shardings(abstract, mesh, config["sharding"]),
  )
  return Plan(task, optimiser, mesh, create, target)


def require_divisible(name: str, size: int, mesh: Mesh) -> None:
  """Raises UserError if a batch of `size` clips cannot be split evenly."""
  if size < 1 or size % mesh.size:
    raise errors.UserError(
      f"{name} must be a positive multiple of the {mesh.size} devices, "
      f"found {size}"
    )


def init(run: Plan) -> state_lib.TrainState:
  """A fresh state, each leaf created where its sharding puts it."""
  where = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  with jax.set_mesh(run.mesh):
    return jax.jit(run.create, out_shardings=where)()


def compile_step(
  run: Plan, config: Mapping[str, Any]
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """The compiled (state, batch) -> (state, metrics); the state is donated."""
  schedule = optim.learning_rate(config["optim"], config["steps"])

  def step(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    gradient = jax.value_and_grad(run.task.loss_fn, has_aux=True)
    (loss, metrics), grads = gradient(state.params, batch, rng)
    updates, opt = run.optimiser.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = optim.average(ema, params, state.step, config["ema"])
    metrics = {
      "loss": loss,
      **metrics,
      "grad_norm": optax.tree.norm(grads),
      "lr": schedule(state.step),
    }
    new = state.replace(step=state.step + 1, params=params, opt=opt, ema=ema)
    return new, metrics

  where = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  batch = NamedSharding(run.mesh, sharding.BATCH)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(where, batch),
    out_shardings=(where, NamedSharding(run.mesh, P())),
  )


def put(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Global arrays from each process's part of a batch."""
  where = NamedSharding(mesh, sharding.BATCH)
  return {
    name: jax.make_array_from_process_local_data(where, value)
    for name, value in batch.items()
  }
