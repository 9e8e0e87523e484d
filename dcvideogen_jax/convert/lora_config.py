"""Reads alpha of low-rank updates from their description in JSON.

The description is used if the tensors do not give alpha. PEFT writes it as
adapter_config.json beside its weights; diffusers writes the same fields into
the header of its files. A module's alpha is found as in PEFT 0.21: the first
pattern that matches, in the order of the file, takes precedence over
`lora_alpha`, or `alpha` of LoHa and LoKr. Fields that ask for what is not read
are refused.
"""

import json
import math
import pathlib
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dcvideogen_jax import errors
from dcvideogen_jax.convert import (
  lora_changes,
  lora_forms,
  lora_names,
  sources,
)

NAME = "adapter_config.json"
# The entry of a safetensors header, and prefixes that its keys may have.
HEADER = "lora_adapter_metadata"
PREFIXES = ("transformer.", "base_model.model.")

# PEFT's default of lora_alpha and of alpha, and of r.
_ALPHA = 8.0
_R = 8
# PEFT's types -> forms of adapters.
_FORMS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": lora_forms.IA3}
# Values of init_lora_weights that leave the base's weights as they are.
_UNCHANGED_BASE = ("gaussian", "eva", "orthogonal", "mica")
# Fields that make the update more than a product of two factors.
_VARIANTS = (
  "use_qalora",
  "use_bdlora",
  "arrow_config",
  "kasa_config",
  "monteclora_config",
  "velora_config",
  "alora_invocation_tokens",
  "layer_replication",
  "target_parameters",
  "trainable_token_indices",
)

# Shortens values for messages.
_short = reprlib.repr
_Number = TypeVar("_Number", int, float)


class Description(NamedTuple):
  """The description of low-rank updates.

  Attributes:
    where: the file that holds the description.
    form: key of `lora_forms.FORMS`.
    alpha: alpha of modules that no pattern matches.
    rank: rank of modules that no pattern matches; None if it is not given.
    alphas: pairs of a pattern of modules' names and their alpha, in order.
    ranks: pairs of a pattern of modules' names and their rank, in order.
    rooted: whether alpha is divided by the square root of the rank (rsLoRA).
    whole: whether the weights include some that replace those of the base.
    dora: whether every module has a magnitude.
    start: how the factors started from the base, a key of `lora_changes.STARTS`
      or None.
  """

  where: pathlib.Path
  form: str
  alpha: float
  rank: int | None
  alphas: Sequence[tuple[re.Pattern[str], float]]
  ranks: Sequence[tuple[re.Pattern[str], int]]
  rooted: bool
  whole: bool
  dora: bool
  start: str | None

  def require_of(self, update: lora_names.Update) -> None:
    """Requires that an update has the description's form.

    Raises:
      errors.UserError: if its form is another, or it lacks a magnitude.
    """
    if update.form != self.form:
      raise errors.UserError(
        f"{self.where} is not of these weights: it describes {self.form}, and"
        f" {update.module} is {update.form}"
      )
    if self.dora and update.magnitude is None:
      raise errors.UserError(
        f"{self.where} has use_dora, but the weights have no"
        f" {update.module}.lora_magnitude_vector"
      )

  def factor(self, update: lora_names.Update, rank: int | None) -> float:
    """Returns the number by which the product of an update is multiplied.

    Patterns are matched against the module's name in the model and against its
    name in the file, without PEFT's prefix.

    Args:
      update: the update.
      rank: the rank of its factors; None if its tensors have none, whose rank
        is then the description's.

    Raises:
      errors.UserError: if the description gives the module another rank.
    """
    names = (
      update.place.torch.removesuffix(".weight"),
      update.module.removeprefix("base_model.model."),
    )
    ranks = _matching(self.ranks, names)
    if rank is None:
      rank = [*ranks, self.rank or _R][0]
    if self.rank is not None and rank not in (ranks or [self.rank]):
      raise errors.UserError(
        f"{self.where} is not of these weights: it gives {names[0]} the rank"
        f" {(ranks or [self.rank])[0]}, the weights have {rank}"
      )
    alphas = _matching(self.alphas, names)
    if len(set(alphas)) > 1:
      warnings.warn(
        f"{self.where}: more than one alpha_pattern matches the same module;"
        " the first in the file is taken, as PEFT does",
        stacklevel=2,
      )
    alpha = alphas[0] if alphas else self.alpha
    return alpha / (rank**0.5 if self.rooted else rank)


def find(source: sources.Source) -> Description | None:
  """Finds the description of low-rank updates; returns None without one.

  It is adapter_config.json in a directory or beside adapter_model.*, or an
  entry in the header of a safetensors file. An adapter_config.json without an
  adapter_model.* is taken to describe the file beside it, with a warning.

  Args:
    source: as for `sources.open_source`.

  Raises:
    errors.UserError: if the description is damaged or has a value that is not a
      number, or if its updates are more than a product of two factors or belong
      to an altered base; or if a directory holds several files of updates.
  """
  if isinstance(source, Mapping):
    return None
  path = pathlib.Path(source)
  beside = (path if path.is_dir() else path.parent) / NAME
  if path.is_dir() or path.stem == "adapter_model":
    if beside.is_file():
      return _read(beside)
  if (text := _header(path)) is not None:
    return _parse(path, text)
  if beside.is_file() and not any(path.parent.glob("adapter_model.*")):
    warnings.warn(
      f"{path}: alpha is taken from {beside}, the only description there",
      stacklevel=2,
    )
    return _read(beside)
  return None


def _header(path: pathlib.Path) -> str | None:
  """Returns the description in the header of the (only) safetensors file."""
  paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
  found = {
    file: sources.metadata(file).get(HEADER)
    for file in paths
    if file.suffix == ".safetensors"
  }
  if len(found) > 1 and any(text is not None for text in found.values()):
    raise errors.UserError(
      f"{path} holds several files of low-rank updates, name one:"
      f" {', '.join(file.name for file in found)}"
    )
  return next(iter(found.values()), None)


def _read(path: pathlib.Path) -> Description:
  try:
    return _parse(path, path.read_bytes())
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror}") from e


def _parse(where: pathlib.Path, text: str | bytes) -> Description:
  """Parses a description, and checks the fields that are used."""
  try:
    fields = json.loads(text)
  except (ValueError, TypeError, RecursionError) as e:
    raise errors.UserError(
      f"{where}: the description of low-rank updates is not JSON: {e}"
    ) from e
  if not isinstance(fields, dict):
    raise errors.UserError(
      f"{where}: expected the description of low-rank updates to be a JSON"
      f" object, found {_short(fields)}"
    )
  for prefix in PREFIXES:
    fields = {name.removeprefix(prefix): x for name, x in fields.items()}
  _require_read(where, fields)
  form = _FORMS[fields.get("peft_type", "LORA")]
  alpha = "lora_alpha" if form == "LoRA" else "alpha"
  if alpha not in fields and form != lora_forms.IA3:
    warnings.warn(
      f"{where} has no {alpha}: PEFT's default of {_ALPHA:g} is taken",
      stacklevel=2,
    )
  start = fields.get("init_lora_weights")
  start = start.lower() if isinstance(start, str) else None
  return Description(
    where,
    form,
    _number(where, alpha, fields.get(alpha, _ALPHA)),
    _rank(where, "r", fields["r"]) if "r" in fields else None,
    _patterns(where, fields, "alpha_pattern", _number),
    _patterns(where, fields, "rank_pattern", _rank),
    bool(fields.get("use_rslora")),
    bool(fields.get("modules_to_save"))
    or fields.get("bias", "none") not in ("none", None),
    bool(fields.get("use_dora")),
    start if start in lora_changes.STARTS else None,
  )


def _require_read(where: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Raises UserError unless the described updates can be read exactly."""
  found = [f"{n}={_short(fields[n])}" for n in _VARIANTS if fields.get(n)]
  kind = fields.get("peft_type", "LORA")
  if not isinstance(kind, str) or kind not in _FORMS:
    found.insert(0, f"peft_type={_short(kind)}")
  if found:
    raise errors.UserError(
      f"{where}: expected LoRA, DoRA, LoHa, LoKr or (IA)3, found"
      f" {', '.join(found)}, which is not read"
    )
  start = fields.get("init_lora_weights", True)
  if start in (True, False, None):
    return
  known = (*_UNCHANGED_BASE, *lora_changes.STARTS)
  if isinstance(start, str) and start.lower() in known:
    return
  if isinstance(start, str) and start.startswith("pissa_niter_"):
    why = "has taken a random decomposition, which cannot be repeated, off"
  else:
    why = "has altered"
  raise errors.UserError(
    f"{where}: with init_lora_weights={_short(start)} PEFT {why} the base that"
    " the updates belong to: expected updates of the base itself; PEFT writes"
    " them with save_pretrained(..., path_initial_model_for_weight_conversion"
    "=...)"
  )


def _patterns(
  where: pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  convert: Callable[[pathlib.Path, str, Any], _Number],
) -> list[tuple[re.Pattern[str], _Number]]:
  """Compiles patterns that match whole names or their ends, as PEFT's do."""
  patterns = fields.get(name) or {}
  if not isinstance(patterns, dict):
    raise errors.UserError(
      f"{where}: expected {name} to be a JSON object, found {_short(patterns)}"
    )
  compiled = []
  for pattern, value in patterns.items():
    try:
      expression = re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as e:
      raise errors.UserError(
        f"{where}: {_short(pattern)} in {name} is no regular expression: {e}"
      ) from e
    what = f"{name} of {_short(pattern)}"
    compiled.append((expression, convert(where, what, value)))
  return compiled


def _matching(
  patterns: Sequence[tuple[re.Pattern[str], _Number]], names: Sequence[str]
) -> list[_Number]:
  """Returns the values of all patterns that match one of the names."""
  return [
    value
    for expression, value in patterns
    if any(expression.fullmatch(name) for name in names)
  ]


def _number(where: pathlib.Path, name: str, value: Any) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  # Larger numbers could be infinite in float32.
  if not is_number or not abs(value) < 2.0**127 or math.isnan(value):
    raise errors.UserError(
      f"{where}: expected {name} to be a finite number, found {_short(value)}"
    )
  return float(value)


def _rank(where: pathlib.Path, name: str, value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise errors.UserError(
      f"{where}: expected {name}, a rank, to be a positive integer, found"
      f" {_short(value)}"
    )
  return value
