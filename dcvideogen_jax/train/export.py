"""A run's result under the names of PyTorch: whole models, parts, updates.

task              what is written
autoencoder       the model
wan_autoencoder   the model
align             the patch embedding, as DC-VideoGen's trainer names it
denoise           the transformer, low-rank updates merged; or, as "lora", the
                  updates and whatever else was trained, for PEFT
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from dcvideogen_jax import checkpoint, convert, documents, errors, files, tree
from dcvideogen_jax.adapt import phases
from dcvideogen_jax.convert import api, engine, matching, writing
from dcvideogen_jax.models import dc_ae_v, wan_vae
from dcvideogen_jax.train import statistics, step, weights

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FORMATS = ("merged", "lora")
_SHARD_BYTES = 10_000_000_000
# What DC-VideoGen's trainer puts before the names of its first phase's file.
_FIRST_PHASE = "0."


class _Row(NamedTuple):
  """How a task's result is written.

  Attributes:
    kind: of the model, a key of `convert.KINDS`.
    build: config -> module.
    dtype: of the stored weights unless told otherwise. What later trainings
      start from keeps every bit.
    layout: likewise.
    fields: of the model that are no weights and may be given.
  """

  kind: str
  build: Any
  dtype: str
  layout: str | None
  fields: tuple[str, ...] = ()


def _transformer(config: Mapping[str, Any]) -> Any:
  return weights.build(config, phases.find(config["phase"]))


_ROWS = {
  "autoencoder": _Row(
    "dc_ae_v",
    lambda config: dc_ae_v.build(config["model"]),
    "bfloat16",
    None,
    ("latent_scale",),
  ),
  "wan_autoencoder": _Row(
    "wan_vae",
    lambda config: wan_vae.build(config["model"]),
    "float32",
    "diffusers",
    ("mean", "std"),
  ),
  "align": _Row("wan_dit", _transformer, "float32", "diffusers"),
  "denoise": _Row("wan_dit", _transformer, "float32", "diffusers"),
}


class Result(NamedTuple):
  """What a run has made so far.

  Attributes:
    step: of the checkpoint.
    config: of the run.
    kind: of the model, a key of `convert.KINDS`.
    module: the model.
    params: its parameters, or the part that an alignment trains: averaged ones
      where the run keeps an average.
    lora: low-rank updates, {} without.
    trained: names of the parameters that were trained.
  """

  step: int
  config: Mapping[str, Any]
  kind: str
  module: Any
  params: Any
  lora: Any
  trained: tuple[str, ...]


def load(workdir: str | os.PathLike[str]) -> Result:
  """Reads a run's newest checkpoint, on any number of devices.

  What was frozen comes from where the run itself has it: `config["start"]`.

  Args:
    workdir: what `loop.fit` was given; the run may go on meanwhile.

  Raises:
    errors.UserError: if there is no run, no readable checkpoint, or the weights
      that it started from are gone.
  """
  config = _read_config(workdir)
  row = _ROWS[config["task"]]
  # The machine that exports need not be the one that trained, and what encoded
  # the data, or replaced a text, is no part of the result.
  changes = {"mesh": {"fsdp": -1}, "sharding": ((".*", "fsdp"),)}
  changes |= {"encoders": None, "negative": None}
  with _blamed(workdir):
    run = step.plan(config | changes)
  directory, restored = files.path(workdir) / "checkpoints", None
  if directory.exists():
    with checkpoint.Checkpointer(directory, read_only=True) as saver:
      restored = saver.restore(run.state)
  if restored is None:
    raise errors.UserError(f"{workdir} holds no checkpoint yet")
  # An alignment's result is what it has trained.
  frozen = {} if config["task"] == "align" else step.init_frozen(run)
  found = step.ema_variables(restored.state, frozen)
  trained = run.state.params
  if row.kind == "wan_dit":
    trained = trained.get("params", {})
  else:
    found = {"params": found}
  return Result(
    restored.step,
    config,
    row.kind,
    row.build(config),
    found["params"],
    found.get("lora", {}),
    tuple(tree.names(trained)),
  )


def _read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  try:
    config = documents.parse(_config_of(workdir).read_bytes())
  except FileNotFoundError as e:
    raise errors.UserError(f"{workdir} holds no run: {e}") from e
  except (OSError, ValueError) as e:
    raise _damaged(workdir, e) from e
  if not isinstance(config, dict) or not isinstance(config.get("task"), str):
    raise _damaged(workdir, "expected the config of a run")
  if config["task"] not in _ROWS:
    raise errors.UserError(
      f"a run of task {config['task']!r} cannot be exported: expected one of "
      f"{', '.join(_ROWS)}"
    )
  with _blamed(workdir):
    _ROWS[config["task"]].build(config)
  return config


def _config_of(workdir: str | os.PathLike[str]) -> files.Path:
  return files.path(workdir) / "config.json"


def _damaged(workdir: str | os.PathLike[str], reason: Any) -> errors.UserError:
  return errors.UserError(
    f"{_config_of(workdir)} cannot be read ({reason}): starting the training"
    " again writes it anew"
  )


@contextlib.contextmanager
def _blamed(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Names the config that nothing can be made of; its fields may be any."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(f"{_config_of(workdir)}: {e}") from e
  except (ArithmeticError, AttributeError, LookupError) as e:
    raise _damaged(workdir, repr(e)) from e
  except (TypeError, ValueError) as e:
    raise _damaged(workdir, (str(e).splitlines() or [repr(e)])[0]) from e


def export(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  dtype: str | None = None,
  **options: Any,
) -> int:
  """Writes the newest checkpoint's averaged weights.

  Args:
    workdir: as for `load`.
    output: as for `write`, as are the others.
    dtype: of the stored weights.
    **options: format, layout, fields; fields that are not given are measured
      where the run's config says on how many batches.

  Returns:
    The step of the checkpoint.

  Raises:
    errors.UserError: as `write`, before anything is read, and as `load`.
  """
  _check(_read_config(workdir), dtype, **options)
  found = load(workdir)
  fields = options.pop("fields", None)
  if fields is None:
    fields = statistics.measure(found.config, found.module, found.params)
  write(found, output, dtype, fields=fields, **options)
  return found.step


def write(
  result: Result,
  output: str | os.PathLike[str],
  dtype: str | None = None,
  *,
  format: str = "merged",
  layout: str | None = None,
  fields: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
  """Writes a result.

  Args:
    result: as of `load`.
    output: a directory; made if it is missing. `convert.load` reads it; after
      "align" `convert.load_part`, in format "lora" `convert.load_lora`.
    dtype: of the stored weights, a key of `DTYPES`; None is bfloat16 for
      DC-AE-V and float32 for what later trainings start from. What a
      transformer keeps in float32 stays so. Updates are added in float32,
      whatever is written.
    format: "merged", or "lora": low-rank updates and, as a whole, the other
      parameters that were trained, in one file that PEFT reads.
    layout: names and config.json of which library, one of the kind's layouts;
      None is diffusers', and our own for DC-AE-V.
    fields: values of the model's description that were measured: "mean" and
      "std" of Wan's autoencoder, per channel, "latent_scale" of DC-AE-V.

  Returns:
    The files, the weights first.

  Raises:
    errors.UserError: for a format, dtype, layout or field that the result
      cannot have; or if `output` cannot be written.
  """
  target = _check(result.config, dtype, format, layout, fields)
  if format == "lora":
    return _write_lora(output, result, target)
  if result.config["task"] == "align":
    return _write_patch_embedding(output, result, target)
  params = _stored(result.kind, target, merged(result))
  return convert.save(
    output,
    result.kind,
    target.module,
    {"params": params},
    layout=target.layout,
    shard_size=target.layout and _SHARD_BYTES,
  )


class _Target(NamedTuple):
  """What is written: the module without updates, with what was measured."""

  module: Any
  dtype: Any
  layout: str | None


def _check(
  config: Mapping[str, Any],
  dtype: str | None = None,
  format: str = "merged",
  layout: str | None = None,
  fields: Mapping[str, Any] | None = None,
) -> _Target:
  """What a run's result shall become; errors as of `write`."""
  row = _ROWS[config["task"]]
  layout = layout or row.layout
  stored = errors.choose("dtype", dtype or row.dtype, DTYPES)
  errors.choose("format", format, dict.fromkeys(FORMATS))
  api.rules_of(row.kind, layout)  # Raises for an unknown one.
  low_rank = "phase" in config and phases.find(config["phase"]).lora
  if format == "lora" and not low_rank:
    raise errors.UserError(
      f"a run of {config.get('phase') or config['task']} has no low-rank "
      "updates: expected one of phase lora or direct, or the format merged"
    )
  module = _with_fields(config, row, fields or {})
  return _Target(module, stored, layout)


def merged(result: Result) -> Any:
  """The parameters with low-rank updates added, in float32 where they are."""
  if not result.lora:
    return result.params
  lora = convert.from_collection(result.lora, result.module.lora_alpha)
  params = tree.flatten(result.params)
  for name in lora.factors:
    params[name] = params[name].astype(jnp.float32)
  return convert.merge(_nested(params), lora)


def _with_fields(
  config: Mapping[str, Any], row: _Row, fields: Mapping[str, Any]
) -> Any:
  """The module without updates, with what was measured."""
  if unknown := sorted(fields.keys() - set(row.fields)):
    raise errors.UserError(
      f"fields of {row.kind} that can be given are "
      f"{', '.join(row.fields) or 'none'}, found {', '.join(unknown)}"
    )
  known = convert.config_of(row.build(config))
  try:
    return convert.KINDS[row.kind].build({**known, **fields})
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"fields: {e}") from e


def _stored(kind: str, target: _Target, params: Any) -> Any:
  """`params` in the dtype, but for what the model keeps in float32."""
  module = target.module.clone(param_dtype=target.dtype)
  return jax.tree.map(
    lambda x, like: x.astype(like.dtype),
    params,
    matching.parameters(kind, module),
  )


def _write_patch_embedding(output, result, target) -> list[pathlib.Path]:
  rules = api.rules_of(result.kind, target.layout)
  tensors = {
    _FIRST_PHASE + name: writing.cast(tensor, target.dtype)
    for name, tensor in engine.torch_tensors(rules, result.params).items()
  }
  return writing.write_directory(output, "model", tensors, config=None)


def _write_lora(output, result, target) -> list[pathlib.Path]:
  params = tree.flatten(result.params)
  trained = _nested({name: params[name] for name in result.trained})
  start = result.config["start"]
  return convert.save_adapter(
    output,
    result.kind,
    {"lora": result.lora, "params": trained},
    result.module.lora_alpha,
    layout=target.layout,
    dtype=target.dtype,
    base=start["weights"] or start["base"],
  )


def _nested(leaves: Mapping[str, Any]) -> Any:
  return flax.traverse_util.unflatten_dict(leaves, sep="/")
