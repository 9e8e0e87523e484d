"""From a config to a compiled step, on any mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcvideogen_jax import differences, errors, flops, sharding, tree
from dcvideogen_jax.train import (
  align,
  autoencoders,
  denoise,
  optim,
  ranges,
)
from dcvideogen_jax.train import task as task_lib

# What can be trained, by the name that a config gives it.
TASKS: Mapping[str, Callable[[Mapping[str, Any]], task_lib.Task]] = {
  "autoencoder": autoencoders.autoencoder,
  "wan_autoencoder": autoencoders.wan_autoencoder,
  "align": align.align,
  "denoise": denoise.denoise,
}


def build_task(config: Mapping[str, Any]) -> task_lib.Task:
  """The task of a config.

  Raises:
    errors.UserError: for an unknown task, or what building it raises.
  """
  return errors.choose("task", config["task"], TASKS)(config)


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, in one tree.

  Leaves are named "params/...", "opt/0/mu/...", "ema/...", "rng", "step".
  `params`, `opt` and `ema` hold trainable leaves only, nested as the task's
  variables are; frozen ones are a tree of their own, which no step changes and
  no checkpoint holds. `ema` is None where the run keeps no EMA. `rng`, the
  numbers of a key, is never advanced: a step folds its number into the key
  (`step_key`), so that a resumed step draws what an uninterrupted one would
  have drawn.
  """

  step: jax.Array
  params: Any
  opt: optax.OptState
  ema: Any
  rng: jax.Array


def new_state(
  params: Any,
  optimiser: optax.GradientTransformation,
  seed: int,
  with_ema: bool,
) -> TrainState:
  """The state before the first step; pure, for `jax.eval_shape`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimiser.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    rng=jax.random.key_data(task_lib.steps_key(seed)),
  )


def step_key(state: TrainState) -> jax.Array:
  """What the next step draws from."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def ema_variables(state: TrainState, frozen: Any) -> Any:
  """The task's variables with EMA parameters, or current ones without EMA."""
  return tree.merge(state.params if state.ema is None else state.ema, frozen)


class TrainPlan(NamedTuple):
  """What a config describes, before anything is allocated.

  Attributes:
    task: what is trained.
    optimiser: changes the trainable variables.
    update_ema: as `optim.ema` gives it.
    mesh: the devices.
    seed: of the start and of what steps draw.
    split: the task's variables -> (trainable, frozen).
    state: tree of `jax.ShapeDtypeStruct`s with their shardings.
    frozen: the same for the variables that are not trained.
  """

  task: task_lib.Task
  optimiser: optax.GradientTransformation
  update_ema: optim.UpdateEMA | None
  mesh: Mesh
  seed: int
  split: Callable[[Any], tuple[Any, Any]]
  state: TrainState
  frozen: Any


def plan(
  config: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> TrainPlan:
  """Builds the task, the optimiser, the mesh and the sharded abstract state.

  Args:
    config: of a training.
    devices: of the mesh, as `sharding.make_mesh` takes them.

  Raises:
    errors.UserError: for anything in the config that does not fit.
  """
  ranges.check(config)
  task = build_task(config)
  optimiser = optim.build(config["optim"], config["steps"])
  update_ema = optim.ema(config["ema"])
  mesh = sharding.make_mesh(config["mesh"], devices)
  seed = config["seed"]
  variables = jax.eval_shape(lambda: task.init(task_lib.start_key(seed)))
  mask = tree.match_tree(task.trainable, variables)
  split = functools.partial(tree.split, mask=mask)
  params, frozen = split(variables)
  if not params:
    raise errors.UserError(f"task {config['task']!r} would train nothing")
  with_ema = update_ema is not None
  state = jax.eval_shape(
    lambda p: new_state(p, optimiser, seed, with_ema), params
  )
  state = _placed(state, mesh, config["sharding"])
  frozen = _placed({"frozen": frozen}, mesh, config["sharding"])["frozen"]
  return TrainPlan(
    task, optimiser, update_ema, mesh, seed, split, state, frozen
  )


def _placed(abstract: Any, mesh: Mesh, rules: Any) -> Any:
  return jax.tree.map(
    lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
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


def init(run: TrainPlan) -> tuple[TrainState, Any]:
  """(state, frozen variables), each leaf created where its sharding puts it.

  Raises:
    errors.UserError: if what the task starts from does not fit.
  """
  params, frozen = _start(run)
  create = functools.partial(
    new_state,
    optimiser=run.optimiser,
    seed=run.seed,
    with_ema=run.update_ema is not None,
  )
  with jax.set_mesh(run.mesh):
    return jax.jit(create, out_shardings=_where(run.state))(params), frozen


def init_frozen(run: TrainPlan) -> Any:
  """What `init` would give as the frozen variables, for a restored state.

  Raises:
    errors.UserError: as `init`.
  """
  return _start(run, only_frozen=True)[1] if run.frozen else {}


def _start(run: TrainPlan, only_frozen: bool = False) -> tuple[Any, Any]:
  """(trainable, frozen) variables; the first need not be there."""
  where = _where(run.state.params), _where(run.frozen)
  if run.task.start is not None:
    with jax.set_mesh(run.mesh):
      variables = run.task.start(tree.merge(*where))
    differences.require_equal(
      _described(tree.merge(run.state.params, run.frozen)),
      _described(variables),
      "what the task starts from",
    )
    return run.split(variables)

  def create():
    params, frozen = run.split(run.task.init(task_lib.start_key(run.seed)))
    return ({} if only_frozen else params), frozen

  out = ({} if only_frozen else where[0]), where[1]
  with jax.set_mesh(run.mesh):
    return jax.jit(create, out_shardings=out)()


def _described(variables: Any) -> dict[str, tuple[Any, ...]]:
  return {
    name: (*leaf.shape, str(leaf.dtype))
    for name, leaf in tree.flatten(variables).items()
  }


def cut(batch: Any, parts: int) -> Any:
  """Arrays (b, ...) to (parts, b / parts, ...), split over the mesh alike.

  Part i gets the samples i, i + parts, ...: each device cuts what it has.
  """

  def one(x):
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, "batch")

  return jax.tree.map(one, batch)


def gradients(
  task: task_lib.Task, trainable: Any, frozen: Any, drawn: Any, parts: int
) -> tuple[task_lib.Metrics, Any]:
  """Loss, metrics and gradients: float32 means over the parts of a batch.

  Args:
    task: gives the loss.
    trainable: what gradients are for.
    frozen: the other variables.
    drawn: the whole batch, each array (b, ...).
    parts: into how many `b` is cut, so that a large batch fits into memory.

  Returns:
    ({"loss": ..., **metrics}, a tree like `trainable`).
  """

  def loss_fn(trainable, part):
    return task.loss_fn(tree.merge(trainable, frozen), part)

  def once(part):
    both = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = both(trainable, part)
    return jax.tree.map(
      lambda x: x.astype(jnp.float32), ({"loss": loss, **metrics}, grads)
    )

  if parts == 1:
    return once(drawn)
  pieces = cut(drawn, parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(once, jax.tree.map(lambda x: x[0], pieces)),
  )
  total, _ = jax.lax.scan(
    lambda total, part: (jax.tree.map(jnp.add, total, once(part)), None),
    zeros,
    pieces,
  )
  return jax.tree.map(lambda x: x / parts, total)


def compile_step(
  run: TrainPlan, config: Mapping[str, Any]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The compiled (state, frozen, batch) -> (state, metrics).

  The state is donated. "grad_norm" is that of the whole batch's gradient,
  before it is clipped.
  """
  schedule = optim.learning_rate(config["optim"], config["steps"])
  where = _where(run.state)

  def step(state, frozen, batch):
    batch = run.task.encode(tree.merge(state.params, frozen), batch)
    drawn = run.task.draw(batch, step_key(state))
    metrics, grads = gradients(
      run.task, state.params, frozen, drawn, config["accumulate"]
    )
    updates, opt = run.optimiser.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = run.update_ema and run.update_ema(state.ema, params, state.step)
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
  run: TrainPlan,
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
  to = NamedSharding(run.mesh, sharding.BATCH)
  placed = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    for name, x in batch.items()
  }
  with jax.set_mesh(run.mesh):
    return compile_step(run, config).trace(run.state, run.frozen, placed)


def model_flops(
  config: Mapping[str, Any],
  batch: Mapping[str, jax.ShapeDtypeStruct],
  devices: Sequence[Any] | None = None,
) -> int:
  """FLOPs that a step of all devices needs, whatever it does to save memory.

  What rematerialisation repeats is not counted, nor what a mask hides, but for
  chunks that are whole; convolutions count as accelerators compute them. They
  are those of `flops.count`, of a trace that takes seconds for a large model.

  Args:
    config: of a training.
    batch: shapes of a whole batch's arrays.
    devices: the first of them is traced for; jax's own unless given.
  """
  model = {k: v for k, v in config["model"].items() if k != "remat"}
  if "heads" in model:
    model["attention"] = "by_chunks" if model.get("chunk") else "reference"
  elif config["task"] in ("autoencoder", "wan_autoencoder"):
    model["conv3d"] = "xla"
  plain = {**config, "model": model, "mesh": {"data": 1}, "accumulate": 1}
  run = plan(plain, (devices or jax.local_devices())[:1])
  return flops.count(trace(run, plain, batch).jaxpr.jaxpr)


def put(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Global arrays from each process's part of a batch."""
  to = NamedSharding(mesh, sharding.BATCH)
  return {
    name: jax.make_array_from_process_local_data(to, value)
    for name, value in batch.items()
  }
