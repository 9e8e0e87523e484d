"""The one training loop: config -> data -> task -> step -> checkpoint."""

import contextlib
import itertools
import json
import math
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.traverse_util
import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from dcvideogen_jax import (
  checkpoint,
  documents,
  errors,
  files,
  flops,
  report,
  sharding,
)
from dcvideogen_jax.train import profiling, validation
from dcvideogen_jax.train import step as step_lib


class Evaluator(Protocol):
  """Measures a model during its training and after the last step.

  It is called in every process, under the run's mesh.

  Attributes:
    every: steps between two measurements; 0 for one after the last step only.
  """

  every: int

  def __call__(
    self, variables: Any, step: int
  ) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
    """Measures the model after a step.

    Args:
      variables: the task's variables: EMA parameters if the run keeps an EMA,
        otherwise current ones, and the frozen variables.
      step: number of steps done.

    Returns:
      Metrics, which must be finite, and pictures, uint8 (h, w, 3), both by name
      and the same in every process.
    """
    ...


def batches(
  run: step_lib.TrainPlan, config: Mapping[str, Any], batch_size: int, seed: int
) -> grain.DatasetIterator:
  """Opens this process's part of each global batch.

  Args:
    run: gives the task and the mesh.
    config: of the data.
    batch_size: clips of a global batch.
    seed: of the order of the clips.
  """
  index, count = sharding.process_part(run.mesh)
  return run.task.batches(
    config,
    batch_size=batch_size // count,
    seed=seed,
    shard_index=index,
    shard_count=count,
  )


def _held_out(
  run: step_lib.TrainPlan, config: Mapping[str, Any]
) -> validation.Validation | None:
  """Builds the validation, on the same batches in every run; None if off."""
  if not config["every"]:
    return None
  step_lib.require_divisible("val.batch_size", config["batch_size"], run.mesh)
  with contextlib.closing(
    batches(run, config["data"], config["batch_size"], seed=0)
  ) as found:
    return validation.Validation(
      run, itertools.islice(found, config["batches"])
    )


class _Silent:
  """Stands in for `report.Report` in all processes but the first."""

  def _nothing(self, *args: Any) -> None:
    pass

  note = progress = record = image = restart_clock = flush = _nothing


def _write_config(
  config: Mapping[str, Any],
  workdir: files.Path,
  first: int,
  log: report.Report,
) -> None:
  """Writes config.json, and logs how it differs from that of the last start."""
  path = workdir / "config.json"
  new, old = json.loads(json.dumps(config, default=dict)), None
  exists = path.exists()
  if exists:
    with contextlib.suppress(ValueError):  # Including UnicodeDecodeError.
      old = documents.parse(path.read_bytes())
  with files.atomic(path) as temporary:
    temporary.write_text(json.dumps(new, indent=2) + "\n")
  if exists and not isinstance(old, dict):
    log.note(
      f"{path} was damaged and is written anew: whether the config has changed"
      " since the last start is not known"
    )
  if first:
    log.note(f"resuming after step {first}")
  if first and isinstance(old, dict):
    old, new = (
      flax.traverse_util.flatten_dict(x, keep_empty_nodes=True, sep=".")
      for x in (old, new)
    )
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
      log.note(f"changed since the last start: {', '.join(changed)}")


def _due(every: int, step: int, config: Mapping[str, Any]) -> bool:
  return step == config["steps"] or (every > 0 and step % every == 0)


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
  """Checks that all metrics of a step are finite.

  Raises:
    errors.UserError: names the first metric that is not.
  """
  for name, value in metrics.items():
    if not math.isfinite(value):
      raise errors.UserError(
        f"{name} became {value} at step {step}; nothing was saved since the "
        "last checkpoint"
      )


class MetricWindow:
  """Averages the metrics of the steps since the last report.

  Metrics are read one step late, so that the host need not wait for the device.
  """

  def __init__(self):
    self._pending = None
    self._seen = []

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Adds the metrics of a step, and reads those of the step before.

    Raises:
      errors.UserError: if one of the metrics that are read is not finite.
    """
    pending, self._pending = self._pending, (step, metrics)
    self._read(pending)

  def flush(self) -> None:
    """Reads the metrics of the newest step too.

    Raises:
      errors.UserError: if one of them is not finite.
    """
    pending, self._pending = self._pending, None
    self._read(pending)

  def means(self) -> dict[str, float]:
    """Returns the means since the last call, the newest step included.

    Raises:
      errors.UserError: as `flush` does.
    """
    self.flush()
    seen, self._seen = self._seen, []
    return {k: sum(m[k] for m in seen) / len(seen) for k in seen[0]}

  def _read(self, pending: tuple[int, Any] | None) -> None:
    if pending is None:
      return
    step, metrics = pending
    found = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # jit returns dictionaries sorted by key.
    metrics = {"loss": found.pop("loss"), **found}
    require_finite(step, metrics)
    self._seen.append(metrics)


class Interrupt:
  """A context in which SIGTERM only sets a flag, which the loop reads.

  In a run of several processes, jax's coordination service receives the signal,
  if the service was started before, and all processes get the same answer at
  the same step.
  """

  def __init__(self):
    self._received = False
    self._alone = jax.process_count() == 1

  def __enter__(self) -> "Interrupt":
    # Only the main thread may set handlers; other threads keep the default.
    with contextlib.suppress(ValueError):
      if self._alone:
        self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    with contextlib.suppress(ValueError, AttributeError):
      signal.signal(signal.SIGTERM, self._previous)

  def received(self, step: int) -> bool:
    """Returns whether to save and stop now; call it once after every step."""
    if self._alone:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)

  def _handle(self, *args: object) -> None:
    self._received = True


class _Run(NamedTuple):
  """The parts of a run that stay the same from step to step."""

  config: Mapping[str, Any]
  plan: step_lib.TrainPlan
  data: grain.DatasetIterator
  saver: checkpoint.Checkpointer
  log: Any
  interrupt: Interrupt
  history: report.History | None
  held_out: validation.Validation | None
  evaluators: Sequence[Evaluator]
  trace: profiling.Trace


def fit(
  config: Mapping[str, Any],
  workdir: str | os.PathLike[str],
  evaluators: Sequence[Evaluator] = (),
  profile: range = range(0),
) -> bool:
  """Trains to `config["steps"]`, continuing the run that `workdir` holds.

  Args:
    config: a training config, as the files in `configs/` give it.
    workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/,
      strips/ and, with config["history"], history.jsonl. All processes of a run
      share it. It may begin with gs://.
    evaluators: further measurements during training.
    profile: the steps that are traced into profile/.

  Returns:
    Whether the last step was reached. After SIGTERM the run saves a checkpoint
    and returns False, unless this was the last step.

  Raises:
    errors.UserError: for a config that does not fit; or if a metric is not
      finite, which the error names.
  """
  plan = step_lib.plan(config)
  step_lib.require_divisible(
    "batch_size", config["batch_size"], plan.mesh, config["accumulate"]
  )
  workdir = files.make_directory(workdir)
  with contextlib.ExitStack() as stack:
    data = stack.enter_context(
      contextlib.closing(
        batches(plan, config["data"], config["batch_size"], config["seed"])
      )
    )
    stack.enter_context(jax.set_mesh(plan.mesh))
    interrupt = stack.enter_context(Interrupt())
    saver = stack.enter_context(
      checkpoint.Checkpointer(workdir / "checkpoints", config["keep"])
    )
    restored = saver.restore(plan.state, data)
    first = restored.step if restored else 0
    log: Any = _Silent()
    if jax.process_index() == 0:
      log = stack.enter_context(report.Report(workdir, config["steps"], first))
      _write_config(config, workdir, first, log)
    if first >= config["steps"]:
      log.note(f"step {first} of {config['steps']} is reached already")
      return True
    run = _Run(
      *(config, plan, data, saver, log, interrupt),
      report.History(workdir, first) if config["history"] else None,
      _held_out(plan, config["val"]),
      evaluators,
      stack.enter_context(profiling.Trace(workdir / "profile", profile)),
    )
    if restored:
      return _loop(run, restored.state, step_lib.init_frozen(plan), first)
    return _loop(run, *step_lib.init(plan), first)


def _loop(run: _Run, state, frozen, first: int) -> bool:
  config, log = run.config, run.log
  advance = step_lib.compile_step(run.plan, config)
  seen, work = MetricWindow(), report.Work(config["batch_size"])
  log.note("compiling the training step ...")
  for step in range(first + 1, config["steps"] + 1):
    local = next(run.data)
    batch = step_lib.put(run.plan.mesh, local)
    run.trace.before(step, state)
    with (
      jax.profiler.StepTraceAnnotation("train", step_num=step),
      jax.transfer_guard("disallow"),
    ):
      state, metrics = advance(state, frozen, batch)
    if run.trace.after(step, metrics):
      log.note(f"profiled up to step {step}")
    if run.history:
      run.history.add(step, local)
    seen.add(step, metrics)
    if step == first + 1:
      work = _work(run, batch)
      seen.flush()
      log.restart_clock(step)
    if _due(config["log_every"], step, config):
      log.progress(step, seen.means(), work)
    # Asked once per step: a later signal must not pass for one whose step was
    # saved.
    stop = run.interrupt.received(step)
    if not stop:
      _evaluate(run, state, frozen, step)
    if stop or _due(config["save_every"], step, config):
      seen.flush()
      # Records are flushed first, so that no checkpoint is ahead of them.
      log.flush()
      if run.history:
        run.history.flush()
      run.saver.save(step, state, run.data)
      log.restart_clock(step)
    if stop:
      run.saver.wait()
      log.note(f"SIGTERM: saved step {step}; start again to continue")
      # Evaluation comes last: it can take minutes, and seconds may be left.
      _evaluate(run, state, frozen, step)
      log.flush()
      return step == config["steps"]
  return True


def _work(run: _Run, batch: Mapping[str, jax.Array]) -> report.Work:
  """Measures the work of one step; FLOPs in process 0 only, which logs them."""
  config, count = run.config, 0
  if jax.process_index() == 0:
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()
    }
    count = step_lib.model_flops(config, shapes)
  peak = flops.peak(run.plan.mesh.devices.flat, config.get("dtype", "float32"))
  return report.Work(config["batch_size"], count, peak)


def _evaluate(run: _Run, state, frozen, step: int) -> None:
  """Runs the measurements that are due at a step, and records their results."""
  found, images = {}, {}
  if run.held_out and _due(run.config["val"]["every"], step, run.config):
    found |= run.held_out.measure(state, frozen)
    image = run.held_out.comparison(state, frozen)
    images |= {} if image is None else {"reconstruction": image}
  for evaluator in run.evaluators:
    if _due(evaluator.every, step, run.config):
      variables = step_lib.ema_variables(state, frozen)
      metrics, pictures = evaluator(variables, step)
      found |= metrics
      images |= pictures
  if not found and not images:
    return
  require_finite(step, found)
  run.log.note("  ".join(f"{k} {v:.4g}" for k, v in found.items()))
  run.log.record(step, found)
  for name, pixels in images.items():
    run.log.image(step, name, pixels)
  run.log.restart_clock(step)
