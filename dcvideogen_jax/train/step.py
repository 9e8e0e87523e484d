"""Builds a compiled training step from a config, for any mesh."""

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
  batch_parts,
  dc_ae_v,
  denoise,
  distil,
  optim,
  ranges,
)
from dcvideogen_jax.train import task as task_lib

# Training tasks by the name that a config gives them.
TASKS: Mapping[str, Callable[[Mapping[str, Any]], task_lib.Task]] = {
  "autoencoder": dc_ae_v.autoencoder,
  "wan_autoencoder": autoencoders.wan_autoencoder,
  "align": align.align,
  "denoise": denoise.denoise,
  "distil": distil.distil,
}


def build_task(config: Mapping[str, Any]) -> task_lib.Task:
  """Builds the task that a config names.

  Raises:
    errors.UserError: for an unknown task, or fields that the task refuses.
  """
  return errors.choose("task", config["task"], TASKS)(config)


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, in one tree.

  Leaves are named "params/...", "opt/0/mu/...", "ema/...", "rng", "step".
  `params`, `opt` and `ema` hold trainable leaves only, nested like the task's
  variables. Frozen variables are a separate tree, which no step changes and no
  checkpoint holds. `ema` is None where the run keeps no EMA. `rng` is the raw
  data of a key that is never advanced: each step folds its number into the key
  (`step_key`), so a resumed step draws what an uninterrupted one would have
  drawn.
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
  """Returns the state before the first step; pure, for `jax.eval_shape`.

  Args:
    params: the trainable variables.
    optimiser: whose state is made.
    seed: of the run.
    with_ema: whether the run keeps an EMA of the parameters.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt=optimiser.init(params),
    ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    rng=jax.random.key_data(task_lib.steps_key(seed)),
  )


def step_key(state: TrainState) -> jax.Array:
  """Returns the key that the next step draws from."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def ema_variables(state: TrainState, frozen: Any) -> Any:
  """Returns the task's variables, with EMA parameters if the run keeps any."""
  return tree.merge(state.params if state.ema is None else state.ema, frozen)


class TrainPlan(NamedTuple):
  """A training run as a config describes it, before anything is allocated.

  Attributes:
    task: the training task.
    optimiser: updates the trainable variables.
    update_ema: the EMA's update from `optim.ema`; None without an EMA.
    mesh: the devices.
    seed: of the initial values and of the random numbers of all steps.
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
    config: a training config.
    devices: of the mesh, as `sharding.make_mesh` takes them.

  Raises:
    errors.UserError: for anything in the config that does not fit.
  """
  ranges.check(config)
  task = build_task(config)
  adversary = config.get("discriminator") or {}
  optimiser = optim.two_players(
    config["optim"], adversary.get("optim"), config["steps"]
  )
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
  """Checks that a batch can be cut into parts and split over devices evenly.

  Args:
    name: of the config field, for the error.
    size: clips of the batch.
    mesh: the devices.
    parts: micro-batches into which the batch is cut.

  Raises:
    errors.UserError: if `size` is not a positive multiple of the number of
      micro-batches times the devices that share a batch.
  """
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
  """Creates (state, frozen variables), each leaf directly in its sharding.

  Raises:
    errors.UserError: if the weights that the task starts from do not fit.
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
  """Returns the frozen variables of `init`, for a restored state.

  Raises:
    errors.UserError: as `init`.
  """
  return _start(run, only_frozen=True)[1] if run.frozen else {}


def _start(run: TrainPlan, only_frozen: bool = False) -> tuple[Any, Any]:
  """Returns (trainable, frozen) variables; `only_frozen` may skip the first."""
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


def gradients(
  task: task_lib.Task, trainable: Any, frozen: Any, drawn: Any, parts: int
) -> tuple[task_lib.Metrics, Any]:
  """Computes loss, metrics and gradients, as float32 means over micro-batches.

  Args:
    task: gives the loss.
    trainable: the variables to differentiate by.
    frozen: the other variables.
    drawn: the whole batch with its random arrays, each (b, ...).
    parts: micro-batches into which the batch is cut, to bound memory.

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
  pieces = batch_parts.cut(drawn, parts)
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
  """Returns the jitted step (state, frozen, batch) -> (state, metrics).

  The state is donated. The metric "grad_norm" is the norm of the whole batch's
  gradient before clipping; "d_grad_norm" is a discriminator's.
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
    metrics |= {**optim.norms(grads), "lr": schedule(state.step)}
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
  """Traces the training step of `compile_step` ahead of time, from shapes.

  Args:
    run: the plan of `config`; its devices need not exist.
    config: a training config.
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
  """Counts the FLOPs of a step on all devices, as if memory were unlimited.

  Neither rematerialised work nor attention to chunks that a mask hides is
  counted. Convolutions count as accelerators compute them. The count is that of
  `flops.count` on a trace, which takes seconds for a large model.

  Args:
    config: a training config.
    batch: shapes of a whole batch's arrays.
    devices: the trace is for the first of them; None means jax's local ones.
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
  """Makes global arrays from each process's part of a batch."""
  to = NamedSharding(mesh, sharding.BATCH)
  return {
    name: jax.make_array_from_process_local_data(to, value)
    for name, value in batch.items()
  }
