"""The one training loop: config -> data -> task -> step -> checkpoint."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import signal
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np

from dcvideogen_jax import checkpoint, errors, files, report
from dcvideogen_jax.data import pipeline
from dcvideogen_jax.train import step as step_lib
from dcvideogen_jax.train import validation


def batches(
  config: Mapping[str, Any], batch_size: int, seed: int
) -> grain.DatasetIterator:
  """This process's part of each global batch of `batch_size` clips."""
  count = jax.process_count()
  return pipeline.batches(
    config,
    batch_size=batch_size // count,
    seed=seed,
    shard_index=jax.process_index(),
    shard_count=count,
  )


def _held_out(
  config: Mapping[str, Any], run: step_lib.Plan
) -> list[Mapping[str, np.ndarray]]:
  """The same batches in every run, for validation."""
  step_lib.require_divisible("val.batch_size", config["batch_size"], run.mesh)
  with contextlib.closing(
    batches(config["data"], config["batch_size"], seed=0)
  ) as found:
    return list(itertools.islice(found, config["batches"]))


class _Interrupt:
  """Set by SIGTERM; the loop saves and stops at the next step."""

  def __init__(self):
    self.received = False

  def __enter__(self) -> "_Interrupt":
    # Only the main thread may set handlers; elsewhere the default stays.
    with contextlib.suppress(ValueError):
      self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    with contextlib.suppress(ValueError, AttributeError):
      signal.signal(signal.SIGTERM, self._previous)

  def _handle(self, *args: object) -> None:
    self.received = True


def _require_finite(step: int, metrics: Mapping[str, float]) -> None:
  bad = [name for name, value in metrics.items() if not math.isfinite(value)]
  if bad:
    raise errors.UserError(
      f"{bad[0]} became {metrics[bad[0]]} at step {step}; nothing was saved "
      "since the last checkpoint"
    )


class _Window:
  """Means of the metrics since they were last asked for.

  They are read one step late, so that the device is never waited for.
  """

  def __init__(self):
    self._pending = None
    self._seen = []

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    pending, self._pending = self._pending, (step, metrics)
    self._read(pending)

  def flush(self) -> None:
    """Reads the newest step too; raises UserError if anything is not finite."""
    pending, self._pending = self._pending, None
    self._read(pending)

  def means(self) -> dict[str, float]:
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
    _require_finite(step, metrics)
    self._seen.append(metrics)


def _remember(config: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
  """Writes config.json; returns the keys that differ from an earlier run's."""
  path = workdir / "config.json"
  new = json.loads(json.dumps(config, default=dict))
  changed = []
  if path.exists():
    old, now = _flat(json.loads(path.read_text())), _flat(new)
    changed = [k for k in {**old, **now} if old.get(k) != now.get(k)]
  with files.atomic(path) as temporary:
    temporary.write_text(json.dumps(new, indent=2) + "\n")
  return changed


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(config, dict):
    return {prefix: config}
  found = {}
  for name, value in config.items():
    found |= _flat(value, f"{prefix}.{name}" if prefix else name)
  return found


def _due(every: int, step: int, config: Mapping[str, Any]) -> bool:
  return step == config["steps"] or (every > 0 and step % every == 0)


def fit(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> bool:
  """Trains to `config["steps"]`, continuing what `workdir` holds.

  Args:
    config: as the files in `configs/` give it.
    workdir: gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and
      strips/.

  Returns:
    Whether the last step was reached; False after SIGTERM, which saves first.

  Raises:
    errors.UserError: for a config that does not fit, or a metric that is not
      finite, which is named.
  """
  run = step_lib.plan(config)
  step_lib.require_divisible("batch_size", config["batch_size"], run.mesh)
  workdir = files.make_directory(workdir)
  with contextlib.ExitStack() as stack:
    data = stack.enter_context(
      contextlib.closing(
        batches(config["data"], config["batch_size"], config["seed"])
      )
    )
    stack.enter_context(jax.set_mesh(run.mesh))
    interrupt = stack.enter_context(_Interrupt())
    saver = stack.enter_context(
      checkpoint.Checkpointer(workdir / "checkpoints", config["keep"])
    )
    restored = saver.restore(run.state, data)
    first = restored.step if restored else 0
    log = stack.enter_context(report.Report(workdir, config["steps"], first))
    changed = _remember(config, workdir)
    if restored:
      log.note(f"resuming after step {first}")
      if changed:
        log.note(f"changed since the last start: {', '.join(changed)}")
    state = restored.state if restored else step_lib.init(run)
    return _loop(config, run, state, first, data, saver, log, interrupt)


def _loop(config, run, state, first, data, saver, log, interrupt) -> bool:
  if first >= config["steps"]:
    log.note(f"step {first} of {config['steps']} is reached already")
    return True
  advance = step_lib.compile_step(run, config)
  held_out = None
  if config["val"]["every"]:
    held_out = validation.Validation(run, _held_out(config["val"], run))
  window = _Window()
  log.note("compiling the training step ...")
  for step in range(first + 1, config["steps"] + 1):
    batch = step_lib.put(run.mesh, next(data))
    with jax.transfer_guard("disallow"):
      state, metrics = advance(state, batch)
    window.add(step, metrics)
    if step == first + 1:
      window.flush()
      log.restart_clock(step)
    if _due(config["log_every"], step, config):
      log.progress(step, window.means(), config["batch_size"])
    if held_out and _due(config["val"]["every"], step, config):
      found = held_out.measure(state)
      log.note("  ".join(f"{k} {v:.4g}" for k, v in found.items()))
      log.record(step, found)
      log.image(step, "reconstruction", held_out.strip(state))
      log.restart_clock(step)
    # Asked once: a signal during the save must not pass for a saved step.
    stop = interrupt.received
    if stop or _due(config["save_every"], step, config):
      window.flush()
      saver.save(step, state, data)
      log.restart_clock(step)
    if stop:
      log.note(f"SIGTERM: saved step {step}; start again to continue")
      return step == config["steps"]
  return True
