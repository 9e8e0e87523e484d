"""From a config to a compiled step, on any mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import errors, sharding, tree
from dcvideogen_jax.train import accumulate, optim, ranges, tasks
from dcvideogen_jax.train import state as state_lib
from dcvideogen_jax.train import task as task_lib


class Plan(NamedTuple):
  """What a config describes, before anything is allocated.

  Attributes:
    task: what is trained.
    optimiser: changes the trainable variables.
    average: as `optim.averaging` gives it.
    mesh: the devices.
    seed: of the start and of what steps draw.
    split: the task's variables -> (trainable, frozen).
    state: tree of `jax.ShapeDtypeStruct`s with their shardings.
    frozen: the same for the variables that are not trained.
  """

  task: task_lib.Task
  optimiser: optax.GradientTransformation
  average: optim.Average | None
  mesh: Mesh
  seed: int
  split: Callable[[Any], tuple[Any, Any]]
  state: state_lib.TrainState
  frozen: Any


def plan(
  config: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> Plan:
  """Builds the task, the optimiser, the mesh and the sharded abstract state.

  Args:
    config: of a training.
    devices: of the mesh, as `sharding.make_mesh` takes them.

  Raises:
    errors.UserError: for anything in the config that does not fit.
  """
  ranges.check(config)
  task = tasks.build(config)
  optimiser = optim.build(config["optim"], config["steps"])
  average = optim.averaging(config["ema"])
  mesh = sharding.make_mesh(config["mesh"], devices)
  seed = config["seed"]
  variables = jax.eval_shape(lambda: task.init(state_lib.start_key(seed)))
  mask = tree.match_tree(task.trainable, variables)
  split = functools.partial(tree.split, mask=mask)
  params, frozen = split(variables)
  if not params:
    raise errors.UserError(f"task {config['task']!r} would train nothing")
  state = jax.eval_shape(
    lambda p: state_lib.create(p, optimiser, seed, average is not None), params
  )
  rules = config["sharding"]
  state = _placed(state, mesh, rules)
  frozen = _placed({"frozen": frozen}, mesh, rules)["frozen"]
  return Plan(task, optimiser, average, mesh, seed, split, state, frozen)


def _placed(abstract: Any, mesh: Mesh, rules: Any) -> Any:
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract,
    sharding.shardings(abstract, mesh, rules),
  )


def _where(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def require_divisible(name: str, size: int, mesh: Mesh, parts: int = 1) -> None:
  """Raises UserError if `size` clips cannot be cut and split evenly."""
  if parts < 1:
    raise errors.UserError(f"accumulate must be positive, found {parts}")
  devices = sharding.batch_devices(mesh)
  if size < 1 or size % (devices * parts):
    cut = f" times {parts} micro-batches" if parts > 1 else ""
    raise errors.UserError(
      f"{name} must be a positive multiple of the {devices} devices that "
      f"share a batch{cut}, found {size}"
    )


def init(run: Plan) -> tuple[state_lib.TrainState, Any]:
  """(state, frozen variables), each leaf created where its sharding puts it.

  Raises:
    errors.UserError: if what the task starts from does not fit.
  """
  params, frozen = _start(run, _where(run.state.params), _where(run.frozen))
  create = functools.partial(
    state_lib.create,
    optimiser=run.optimiser,
    seed=run.seed,
    with_ema=run.average is not None,
  )
  where = _where(run.state)
  with jax.set_mesh(run.mesh):
    return jax.jit(create, out_shardings=where)(params), frozen


def init_frozen(run: Plan) -> Any:
  """What `init` would give as the frozen variables, for a restored state.

  Raises:
    errors.UserError: as `init`.
  """
  if not run.frozen:
    return {}
  return _start(run, None, _where(run.frozen))[1]


def _start(run: Plan, trained: Any, frozen: Any) -> tuple[Any, Any]:
  """(trainable, frozen) variables; the first is None where `trained` is."""
  if run.task.start is not None:
    where = tree.merge(_where(run.state.params), _where(run.frozen))
    with jax.set_mesh(run.mesh):
      variables = run.task.start(where)
    tree.require_equal(
      _described(tree.merge(run.state.params, run.frozen)),
      _described(variables),
      "what the task starts from",
    )
    params, rest = run.split(variables)
    return (None if trained is None else params), rest

  def create():
    params, rest = run.split(run.task.init(state_lib.start_key(run.seed)))
    return (None if trained is None else params), rest

  with jax.set_mesh(run.mesh):
    return jax.jit(create, out_shardings=(trained, frozen))()


def _described(variables: Any) -> dict[str, tuple[Any, ...]]:
  return {
    name: (*leaf.shape, str(leaf.dtype))
    for name, leaf in tree.flatten(variables).items()
  }


def compile_step(
  run: Plan, config: Mapping[str, Any]
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """The compiled (state, frozen, batch) -> (state, metrics).

  The state is donated. "grad_norm" is that of the whole batch's gradient,
  before it is clipped.
  """
  schedule = optim.learning_rate(config["optim"], config["steps"])
  parts = config["accumulate"]
  where = _where(run.state)

  def step(state, frozen, batch):
    variables = tree.merge(state.params, frozen)
    batch = accumulate.encode(run.task, variables, batch, parts)
    drawn = run.task.draw(batch, state_lib.step_key(state))
    metrics, grads = accumulate.gradients(
      run.task, state.params, frozen, drawn, parts
    )
    updates, opt = run.optimiser.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = run.average and run.average(state.ema, params, state.step)
    metrics |= {"grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
    new = state.replace(step=state.step + 1, params=params, opt=opt, ema=ema)
    return new, metrics

  batch = NamedSharding(run.mesh, sharding.BATCH)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(where, _where(run.frozen), batch),
    out_shardings=(where, NamedSharding(run.mesh, P())),
  )


def trace(
  run: Plan,
  config: Mapping[str, Any],
  batch: Mapping[str, jax.ShapeDtypeStruct],
) -> jax.stages.Traced:
  """What `compile_step` compiles, ahead and for shapes alone.

  Args:
    run: of `plan`; its devices need not exist.
    config: the same.
    batch: shapes of a whole batch's arrays.

  Raises:
    errors.UserError: if the batch cannot be split over the mesh.
  """
  for x in batch.values():
    require_divisible("batch_size", x.shape[0], run.mesh, config["accumulate"])
  where = NamedSharding(run.mesh, sharding.BATCH)
  placed = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    for name, x in batch.items()
  }
  with jax.set_mesh(run.mesh):
    return compile_step(run, config).trace(run.state, run.frozen, placed)


def put(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Global arrays from each process's part of a batch."""
  where = NamedSharding(mesh, sharding.BATCH)
  return {
    name: jax.make_array_from_process_local_data(where, value)
    for name, value in batch.items()
  }
