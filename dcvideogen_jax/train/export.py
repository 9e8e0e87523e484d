"""Exports a run's result under PyTorch names: a model, a part or updates.

The task of the run says what is written:

- "autoencoder" and "wan_autoencoder": the model, or its smaller decoder where
  the run trains one.
- "align": the patch embedding, as DC-VideoGen's trainer names it.
- "denoise" and "distil": the transformer with its low-rank updates merged; or,
  in format "lora", the updates and the other trained parameters, for PEFT.
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
from dcvideogen_jax.diffusion import few
from dcvideogen_jax.models import dc_ae_v, wan_vae
from dcvideogen_jax.train import dc_ae_v as dc_ae_v_task
from dcvideogen_jax.train import (
  distil,
  fast_decoder,
  statistics,
  step,
  weights,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FORMATS = ("merged", "lora")
_SHARD_BYTES = 10_000_000_000
# Prefix of the tensor names in the file that DC-VideoGen's trainer writes after
# its first phase.
_FIRST_PHASE = "0."


class _Row(NamedTuple):
  """How a task's result is written.

  Attributes:
    kind: of the model, a key of `convert.KINDS`.
    build: config -> module.
    dtype: default dtype of the stored weights. It is float32 for models from
      which later trainings start, so that no bits are lost.
    layout: default layout of the files.
    fields: fields of the model's config that are measured, not trained.
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
  "decoder": _Row(
    "dc_ae_v_decoder",
    lambda config: dc_ae_v.build(fast_decoder.fields(config)),
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
  "distil": _Row("wan_dit", _transformer, "float32", "diffusers"),
}


# The variables of an autoencoder's run that are exported, by kind.
_PARTS = {"dc_ae_v": dc_ae_v_task.PARTS, "dc_ae_v_decoder": ("decoder",)}


def _row(config: Mapping[str, Any]) -> _Row:
  smaller = config["task"] == "autoencoder" and config.get("decoder")
  return _ROWS["decoder" if smaller else config["task"]]


class Result(NamedTuple):
  """The result of a run so far.

  Attributes:
    step: of the checkpoint.
    config: of the run.
    kind: of the model, a key of `convert.KINDS`.
    module: the model.
    params: its parameters, or the part of them that an alignment trains; EMA
      parameters where the run keeps an EMA.
    lora: low-rank updates; {} if the model has none.
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

  Frozen parameters are read from the weights that the run started from,
  `config["start"]`.

  Args:
    workdir: the directory given to `loop.fit`; the run may still be going on.

  Raises:
    errors.UserError: if the directory holds no run or no readable checkpoint,
      or if the weights that the run started from are gone.
  """
  config = _read_config(workdir)
  row = _row(config)
  # The exporting machine may have other devices than the training machine, and
  # neither the encoders nor the negative prompt are part of the result.
  changes = {"mesh": {"fsdp": -1}, "sharding": ((".*", "fsdp"),)}
  changes |= {"encoders": None, "negative": None}
  with _blamed(workdir):
    if row.kind in _PARTS:
      # Nor are the networks that it was trained by.
      changes |= {"lpips": None, "loss": {**config["loss"], "lpips": 0.0}}
    run = step.plan(config | changes)
  directory, restored = files.path(workdir) / "checkpoints", None
  if directory.exists():
    with checkpoint.Checkpointer(directory, read_only=True) as saver:
      restored = saver.restore(run.state)
  if restored is None:
    raise errors.UserError(f"{workdir} holds no checkpoint yet")
  # The result of an alignment is only the part that it trained, as that of a
  # smaller decoder.
  part = config["task"] == "align" or row.kind == "dc_ae_v_decoder"
  frozen = {} if part else step.init_frozen(run)
  found = step.ema_variables(restored.state, frozen)
  trained = run.state.params
  if row.kind == "wan_dit":
    trained = trained.get("params", {})
  elif row.kind in _PARTS:
    found = {"params": {name: found[name] for name in _PARTS[row.kind]}}
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
    _row(config).build(config)
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
  """Names the config file in errors; a damaged file may hold any values."""
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
  """Writes the weights of a run's newest checkpoint, those of the EMA if any.

  Args:
    workdir: as for `load`.
    output: as for `write`.
    dtype: as for `write`.
    **options: `format`, `layout` and `fields`, as for `write`. Fields that are
      not given are measured if "statistics" in the run's config is not 0.

  Returns:
    The step of the checkpoint.

  Raises:
    errors.UserError: as `write` does, before the checkpoint is read; and as
      `load` does.
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
    result: from `load`.
    output: a directory, created if it is missing. `convert.load` reads it;
      after "align" `convert.load_part`, in format "lora" `convert.load_lora`.
    dtype: of the stored weights, a key of `DTYPES`. None is bfloat16 for
      DC-AE-V, and float32 for models from which later trainings start.
      Parameters that a transformer keeps in float32 are stored in float32.
      Low-rank updates are added in float32, whatever the dtype.
    format: "merged", or "lora": one file for PEFT with the low-rank updates
      and, in full, the other parameters that were trained.
    layout: the library whose names and config.json are written, one of the
      kind's layouts. None is diffusers', or our own for DC-AE-V.
    fields: measured fields of the model's config: "mean" and "std" per channel
      of Wan's autoencoder, "latent_scale" of DC-AE-V.

  Returns:
    The files, the weights first.

  Raises:
    errors.UserError: for a format, dtype, layout or field that the result
      cannot have, or if `output` cannot be written.
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
  """What to write: the module, with its measured fields, dtype and layout."""

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
  """Checks how a run's result shall be written; raises as `write` does."""
  row = _row(config)
  layout = layout or row.layout
  stored = errors.choose("dtype", dtype or row.dtype, DTYPES)
  errors.choose("format", format, dict.fromkeys(FORMATS))
  api.rules_of(row.kind, layout)  # Raises for an unknown layout.
  transformer = row.kind == "wan_dit" and "phase" in config
  low_rank = transformer and phases.find(config["phase"]).lora
  if format == "lora" and not low_rank:
    raise errors.UserError(
      f"a run of {config.get('phase') or config['task']} has no low-rank "
      "updates: expected one of phase lora or direct, or the format merged"
    )
  module = _with_fields(config, row, fields or {})
  return _Target(module, stored, layout)


def merged(result: Result) -> Any:
  """Returns the parameters, with low-rank updates added in float32."""
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
  """Builds the module without low-rank updates, with its measured fields."""
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
  """Casts `params` to the dtype, except those that stay in float32."""
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
  start, config = result.config["start"], result.config
  if config["task"] == "distil" and (steps := distil.few_steps(config)):
    few.write(files.make_directory(output), steps)
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
